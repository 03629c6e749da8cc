"""A low-rank set merged into copies of its layers' weights: nothing to compute beside the model, but memory to hold.

The model's own weights stay as they are, and full steps keep using them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        self._stamps: dict[str, tuple[tuple[object, ...], ...]] = {}
        self._samples: dict[str, torch.Tensor] = {}

    @torch.inference_mode(False)  # copies made in it could not be renewed outside it
    @torch.no_grad()
    def refresh(self, thorough: bool = False) -> None:
        """Brings the copies up to date, in the memory they have. What has not changed is not merged again.

        Args:
            thorough: Look also for changes that leave no trace: some values of every weight are compared with those
                that were merged, since an assignment to ``.data``, as when a LoRA is fused, counts no version; and
                weights made in inference mode, which count none at all, are merged anew. Waits for the device.
        """
        found = self._mergeable()
        for path in self._weights.keys() - found.keys():
            del self._weights[path], self._stamps[path], self._samples[path]
        stamps = {path: tuple(map(_stamp, parts)) for path, parts in found.items()}
        kept = [path for path in found if self._stamps.get(path) == stamps[path]]
        if thorough:
            kept = [path for path in kept if not any(part.is_inference() for part in found[path])]
            now = _samples(found)
            if kept and not torch.equal(*(torch.cat([known[path] for path in kept]) for known in (self._samples, now))):
                kept = []
        changed = {path: parts for path, parts in found.items() if path not in set(kept)}
        for path, parts in changed.items():
            self._merge(path, *parts)
        self._stamps = stamps
        self._samples |= _samples(changed)

    def _mergeable(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Path -> the layer's own weight and both factors, of layers that are plain and where the factors are."""
        found = {}
        for path, pair in self._lora.by_layer.items():
            layer = self._transformer.get_submodule(path)
            # offloading brings weights to the device later, and takes them away again
            if _is_plain(layer) and layer.weight.device == pair.lora_A.weight.device:
                found[path] = (layer.weight, pair.lora_A.weight, pair.lora_B.weight)
        return found

    def _merge(self, path: str, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> None:
        merged = self._weights.get(path)
        if merged is None or (merged.dtype, merged.device) != (weight.dtype, weight.device):
            merged = self._weights[path] = torch.empty_like(weight)
        scale = self._lora.by_layer[path].scale
        torch.addmm(weight, up.to(weight), down.to(weight), alpha=scale, out=merged)

    def active(self) -> AbstractContextManager[None]:
        """Context in which the layers compute with the merged weights, as of the last :meth:`refresh`."""
        forwards = self._lora.forwards(self._transformer)
        for path, weight in self._weights.items():
            layer = self._transformer.get_submodule(path)
            if _is_plain(layer):
                forwards[path] = _linear(weight, layer)
        return swapped(self._transformer, **forwards)


def _stamp(weight: torch.Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype


def _samples(layers: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Some values of every layer's matrices, 8 to 15 of the rows and columns of each: whatever is added to a whole
    matrix shows in them."""
    if not layers:
        return {}
    picked = [
        [part[:: max(1, part.shape[0] // 8), :: max(1, part.shape[1] // 8)] for part in p] for p in layers.values()
    ]
    together = torch.cat([part.flatten() for parts in picked for part in parts]).float()
    lengths = [sum(part.numel() for part in parts) for parts in picked]
    return dict(zip(layers, together.split(lengths), strict=True))


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
