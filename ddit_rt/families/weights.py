"""Weights as a model has them, however they are stored: offloaded, in 8 bits, or with a LoRA fused into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_EIGHT_BIT_FLOATS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


@contextmanager
def at_hand(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context, weights of the named children are real tensors, even under sequential CPU offload.

    accelerate's offload keeps them as meta tensors while their layer does not run.
    """
    with ExitStack() as stack:
        for name in names:
            child = module.get_submodule(name)
            for layer in child.modules():
                if hasattr(layer, "_hf_hook"):
                    from accelerate.utils import align_module_device  # it is there, or there would be no such hook

                    stack.enter_context(align_module_device(layer))
        yield


def plain_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight that can be computed with: 8-bit floats of layerwise casting become float32."""
    return weight.float() if weight.dtype in _EIGHT_BIT_FLOATS else weight


def own_weight(layer: Any) -> torch.Tensor | None:
    """A layer's weight without the LoRAs that are fused into it; None where they cannot be told.

    Args:
        layer: A linear or convolution layer, or peft's wrapping of one.
    """
    weight: torch.Tensor = layer.weight
    merged = list(getattr(layer, "merged_adapters", ()))
    if not merged:
        return weight
    if not weight.is_floating_point():
        return None
    added = sum(layer.get_delta_weight(name).float() for name in merged)
    return weight.float() - added
