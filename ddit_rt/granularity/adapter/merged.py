"""A low-rank set merged into copies of its layers' weights: nothing to compute beside the model, but memory to hold.

The model's own weights stay as they are, and full steps keep using them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..swap import swapped
from .lora import LoraSet


class MergedSet:
    """Per layer of a :class:`LoraSet` a copy of the weight with the addition in it.

    Layers that are more than a plain linear layer (quantised, with a user's LoRA, hooked or moved by offloading) keep
    the addition beside them.

    Args:
        lora: The additions, placed where the transformer is.
        transformer: Whose layers they belong to.
    """

    def __init__(self, lora: LoraSet, transformer: nn.Module) -> None:
        self._lora = lora
        self._transformer = transformer
        self._weights: dict[str, torch.Tensor] = {}
        self._stamps: dict[str, tuple[object, ...]] = {}

    @torch.no_grad()
    def refresh(self, always: bool = False) -> None:
        """Brings the copies up to date, in the memory they have.

        Args:
            always: Also where nothing shows that the model's weights have changed; assignments to ``.data`` leave no
                trace.
        """
        for path, pair in self._lora.by_layer.items():
            layer = self._transformer.get_submodule(path)
            # offloading brings weights to the device later, and takes them away again
            if not _is_plain(layer) or layer.weight.device != pair.lora_A.weight.device:
                self._weights.pop(path, None)
                self._stamps.pop(path, None)
                continue
            weight = layer.weight
            parts = (weight, pair.lora_A.weight, pair.lora_B.weight)
            # weights loaded in inference mode count no versions
            stamp = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parts)
            if self._stamps.get(path) == stamp and not always:
                continue
            merged = self._weights.get(path)
            if merged is None or (merged.dtype, merged.device) != (weight.dtype, weight.device):
                merged = self._weights[path] = torch.empty_like(weight)
            down, up = (part.to(weight) for part in parts[1:])
            torch.addmm(weight, up, down, alpha=pair.scale, out=merged)
            self._stamps[path] = stamp

    def active(self) -> AbstractContextManager[None]:
        """Context in which the layers compute with the merged weights, as of the last :meth:`refresh`."""
        forwards = self._lora.forwards(self._transformer)
        for path, weight in self._weights.items():
            layer = self._transformer.get_submodule(path)
            if _is_plain(layer):
                forwards[path] = _linear(weight, layer)
        return swapped(self._transformer, **forwards)


def _linear(weight: torch.Tensor, layer: nn.Module) -> Callable[..., torch.Tensor]:
    def forward(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.linear(inputs, weight, layer.bias)  # type: ignore[arg-type]

    return forward


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not is_traceable_wrapper_subclass(layer.weight)
    )
