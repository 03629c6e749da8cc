"""Weights as a model has them, however they are stored: offloaded, in 8 bits, or with a LoRA fused into them."""

from __future__ import annotations

from typing import Any

import torch

_EIGHT_BIT_FLOATS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


def kept(layer: Any, name: str = "weight") -> Any:
    """A layer's weight or bias as it is kept; None where it has none.

    Under accelerate's sequential offload a layer that does not run has meta tensors, and its hook the real ones.

    Args:
        layer: A linear or convolution layer, or peft's wrapping of one; with another ``name`` any module.
        name: "weight", "bias", or of another parameter or buffer.
    """
    tensor = getattr(layer, name)
    if tensor is not None and tensor.is_meta:
        hook = getattr(layer, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            elsewhere: Any = getattr(one, "weights_map", None)
            if elsewhere is not None:
                tensor = elsewhere[name]
    return tensor


def stored(layer: Any, name: str = "weight") -> Any:
    """A layer's weight or bias to compute with; None where it has none.

    8-bit floats of diffusers' layerwise casting become float32.

    Args:
        layer: A linear or convolution layer, or peft's wrapping of one.
        name: "weight" or "bias".
    """
    tensor = kept(layer, name)
    return tensor.float() if tensor is not None and tensor.dtype in _EIGHT_BIT_FLOATS else tensor


def own_weight(layer: Any) -> torch.Tensor | None:
    """A layer's weight as it is kept, but without the LoRAs that are fused into it; None where they cannot be told.

    Args:
        layer: As for :func:`stored`.
    """
    merged = list(getattr(layer, "merged_adapters", ()))
    weight: torch.Tensor = layer.weight if not layer.weight.is_meta else stored(layer)
    if not merged:
        return weight
    if not weight.is_floating_point():
        return None
    added = sum(layer.get_delta_weight(name).float() for name in merged)
    return weight.float() - added
