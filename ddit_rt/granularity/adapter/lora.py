"""Low-rank additions to a frozen transformer's linear layers, present only while a coarse run is under way.

The layers themselves stay as they are: their forward is wrapped for the length of a context. So full steps cannot
see the addition, a user's own LoRAs (loaded, scaled, fused or unloaded through peft at any time) are neither touched
nor able to switch it off, and quantised or offloaded layers need nothing special. The weights keep peft's names and
layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ...errors import AdapterMismatchError
from ..swap import swapped

_FUSED = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})


class LowRank(nn.Module):
    """Adds B(A x)·alpha/rank to what a layer makes of x; zero at the start.

    Args:
        in_features, out_features: Of the layer that it is added to.
        rank: r, at least 1.
        alpha: Scale times rank.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def add_to(self, result: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """What a layer made of ``inputs`` (..., in) with the addition, (..., out).

        Where no gradient is recorded the second product adds into ``result``: one kernel, and half the memory traffic.
        """
        low = self.lora_A(inputs)
        up = self.lora_B.weight
        plain = type(result) is torch.Tensor and result.is_contiguous()
        # autocast leaves weights in their dtype
        if torch.is_grad_enabled() or not plain or not result.dtype == low.dtype == up.dtype:
            added: torch.Tensor = self.lora_B(low)
            return result + (added if self.scale == 1 else added * self.scale)
        result.view(-1, result.shape[-1]).addmm_(low.flatten(0, -2), up.t(), alpha=self.scale)
        return result


class LoraSet(nn.Module):
    """One low-rank addition per named layer.

    Args:
        layers: Path of a linear layer inside the transformer -> (in_features, out_features).
        rank, alpha: See :class:`LowRank`.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], rank: int, alpha: float) -> None:
        super().__init__()
        # module names hold no dots
        self.pairs = nn.ModuleDict(
            {name.replace(".", "/"): LowRank(*sizes, rank, alpha) for name, sizes in layers.items()}
        )

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Path -> (in_features, out_features)."""
        return {path: (pair.lora_A.in_features, pair.lora_B.out_features) for path, pair in self.by_layer.items()}

    @property
    def by_layer(self) -> dict[str, LowRank]:
        """Path -> its addition."""
        return {name.replace("/", "."): pair for name, pair in self.pairs.items()}  # type: ignore[misc]

    def forwards(self, transformer: nn.Module) -> dict[str, Callable[..., torch.Tensor]]:
        """Path -> the layer's forward with its addition.

        Raises:
            AdapterMismatchError: one of the layers is there, but not used.
        """
        found: dict[str, Callable[..., torch.Tensor]] = {}
        for path, pair in self.by_layer.items():
            if is_fused(transformer, path):
                raise AdapterMismatchError(
                    f"the adapter's LoRA for {path} would have no effect: the model's projections are fused. Call "
                    "unfuse_qkv_projections() on it."
                )
            found[path] = _adding(transformer.get_submodule(path).forward, pair)
        return found

    def active(self, transformer: nn.Module) -> AbstractContextManager[None]:
        """Context in which the layers of ``transformer`` compute with the additions.

        A backward pass through checkpointed blocks runs them again, so it belongs inside the context too.

        Raises:
            AdapterMismatchError: see :meth:`forwards`.
        """
        return swapped(transformer, **self.forwards(transformer))


def is_fused(transformer: nn.Module, path: str) -> bool:
    """Whether diffusers' ``fuse_qkv_projections`` runs another layer in place of the one at ``path``."""
    parent, _, leaf = path.rpartition(".")
    return leaf in _FUSED and bool(getattr(transformer.get_submodule(parent), "fused_projections", False))


def _adding(forward: Callable[..., torch.Tensor], pair: LowRank) -> Callable[..., torch.Tensor]:
    def added(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return pair.add_to(forward(inputs, *args, **kwargs), inputs)

    return added
