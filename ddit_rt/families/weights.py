"""Weights as a model has them, however they are stored: offloaded, quantised, with a LoRA beside them or fused in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UnsupportedPipelineError
from ..granularity import NotFusedError, OwnEnds

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
        hook = getattr(getattr(layer, "base_layer", layer), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            elsewhere: Any = getattr(one, "weights_map", None)
            if elsewhere is not None:
                tensor = elsewhere[name]
    return tensor


def stored(layer: Any, name: str = "weight") -> Any:
    """A layer's weight or bias to compute with, what LoRAs add to it included; None where it has none.

    8-bit floats of diffusers' layerwise casting become float32, and what torchao, GGUF or bitsandbytes have quantised
    is computed from what they keep. With a LoRA it is float32, since a smaller type would round small additions away.

    Args:
        layer: A linear or convolution layer, or peft's wrapping of one.
        name: "weight" or "bias".

    Raises:
        UnsupportedPipelineError: the layer keeps its values in a way that is not known here.
    """
    own, loras = _stored(layer, name), active_loras(layer)
    if not loras:
        return own
    return _with_loras(layer, own, loras) if name == "weight" else _bias_with_loras(layer, own, loras)


def _stored(layer: Any, name: str) -> Any:
    """The same without LoRAs."""
    if not hasattr(layer, name):
        raise _unreadable(layer, f"has no {name}")
    tensor = kept(layer, name)
    if tensor is None:
        return None
    if is_quantised(tensor):
        return _dequantised(layer, tensor)
    if not tensor.is_floating_point():
        raise _unreadable(layer, f"keeps its {name} as {tensor.dtype}")
    return tensor.float() if tensor.dtype in _EIGHT_BIT_FLOATS else tensor


@torch.no_grad()
def _with_loras(layer: Any, own: torch.Tensor, loras: Sequence[str]) -> torch.Tensor:
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    result = own
    for lora in loras:
        is_dora = lora in getattr(layer, "lora_magnitude_vector", ())
        if not hasattr(layer, "lora_A") or (lora in getattr(layer, "lora_variant", ()) and not is_dora):
            raise _unreadable(layer, f"has {lora!r} beside it, which is no plain LoRA")
        down, up = (kept(factors[lora]).to(own).flatten(1) for factors in (layer.lora_A, layer.lora_B))
        added = (up @ down).view(own.shape) * layer.scaling[lora]
        result = result + added
        if is_dora:  # the rows' lengths are learned too; peft measures them without other LoRAs, and scales all
            lengths = kept(layer.lora_magnitude_vector[lora]).to(own).flatten()
            factors = lengths / (own + added).flatten(1).norm(dim=1)
            result = result * factors.view(-1, *[1] * (own.ndim - 1))
    return result


@torch.no_grad()
def _bias_with_loras(layer: Any, own: torch.Tensor | None, loras: Sequence[str]) -> torch.Tensor | None:
    for lora in loras:
        bias = kept(layer.lora_B[lora], "bias")
        if bias is not None:
            added = bias.float() * layer.scaling[lora]
            own = added if own is None else own + added
    return own


def _unreadable(layer: Any, reason: str) -> UnsupportedPipelineError:
    return UnsupportedPipelineError(
        f"the values of a {type(layer).__module__}.{type(layer).__name__} cannot be read: it {reason}. Of what is "
        "quantised torchao's, GGUF's and bitsandbytes' layers are known, and of peft's LoRA and DoRA. Leave the "
        "transformer's embedding and de-embedding as they were loaded, or take coarse='delta' or 'band-split', which "
        "run them as they are."
    )


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight holds codes of torchao, GGUF or bitsandbytes instead of values."""
    return is_traceable_wrapper_subclass(weight) or type(weight).__name__ in ("GGUFParameter", *_BITSANDBYTES)


_BITSANDBYTES = ("Params4bit", "Int8Params")


@torch.no_grad()
def _dequantised(layer: Any, weight: Any) -> torch.Tensor:
    """The values of a quantised weight; each library is there, since the weight is."""
    kind, found = type(weight).__name__, None
    if kind == "GGUFParameter":
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        found = dequantize_gguf_tensor(weight)
    elif kind in _BITSANDBYTES:
        from bitsandbytes import functional

        if kind == "Params4bit":
            found = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            # the first run takes the scales from the weight to the layer's state
            scales = weight.SCB if weight.SCB is not None else getattr(layer, "base_layer", layer).state.SCB
            found = functional.int8_vectorwise_dequant(weight.data, scales)
    else:
        found = weight.dequantize()
    dtype = getattr(layer, "compute_dtype", None) or found.dtype
    return found.as_subclass(torch.Tensor).to(dtype)


def active_loras(layer: Any) -> list[str]:
    """Names of what peft adds to a layer in its forward: loaded, switched on, and not fused into the weight."""
    # peft adds nothing beside a weight that has something fused into it
    if not hasattr(layer, "merged_adapters") or layer.disable_adapters or layer.merged_adapters:
        return []
    parts = [getattr(layer, name) for name in layer.adapter_layer_names]
    return [name for name in layer.active_adapters if any(name in part for part in parts)]


def lora_scale(arguments: Mapping[str, Any]) -> float:
    """The strength that a transformer's call gives to all LoRAs, by which diffusers multiplies their own."""
    given = (arguments.get(name) or {} for name in ("joint_attention_kwargs", "attention_kwargs"))
    return float(next((one["scale"] for one in given if "scale" in one), 1.0))


@contextmanager
def scaled_loras(layers: Sequence[Any], scale: float) -> Iterator[None]:
    """Within the context the LoRAs of ``layers`` are as strong as in a forward that is given ``scale``."""
    own = [(layer.scaling, dict(layer.scaling)) for layer in layers if hasattr(layer, "scaling")]
    try:
        for scaling, strengths in own if scale != 1 else ():
            scaling.update({name: strength * scale for name, strength in strengths.items()})
        yield
    finally:
        for scaling, strengths in own:
            scaling.update(strengths)


def own_weight(layer: Any) -> torch.Tensor | None:
    """A layer's weight as it is kept, without LoRAs beside it or fused into it; None where those cannot be told.

    Args:
        layer: As for :func:`stored`.
    """
    merged = list(getattr(layer, "merged_adapters", ()))
    if is_quantised(layer.weight):
        return None
    weight: torch.Tensor = layer.weight if not layer.weight.is_meta else _stored(layer, "weight")
    if not merged:
        return weight
    if not weight.is_floating_point():
        return None
    added = sum(layer.get_delta_weight(name).float() for name in merged)
    return weight.float() - added


def layer_views(
    embed: nn.Module, deembed: nn.Module, latent: torch.Tensor, patch: int, channels: int, channels_first: bool
) -> OwnEnds:
    """The ends of a transformer as views of its layers' weights, which stay where they are.

    Args:
        embed: Linear, or a convolution over patches of 1 x p x p or p x p; values ordered (channel, row, column).
        deembed: Linear.
        latent: That they are to work on.
        patch: p.
        channels: Of the prediction, the first that the de-embedding gives.
        channels_first: Whether its values are ordered (channel, row, column), not (row, column, channel).

    Raises:
        NotFusedError: a layer is more than its weights, or they are elsewhere or of another dtype than the latent.
    """
    for layer in (embed, deembed):
        name, weight = type(layer).__name__, getattr(layer, "weight", None)
        if type(layer) not in (nn.Linear, nn.Conv2d, nn.Conv3d) or not isinstance(weight, torch.Tensor):
            raise NotFusedError(f"an end of the transformer is a {type(layer).__module__}.{name}, no plain layer")
        if "forward" in layer.__dict__ or layer._forward_pre_hooks or layer._forward_hooks:
            raise NotFusedError("an end of the transformer has hooks, as offloading puts there")
        if weight.dtype != latent.dtype or weight.device != latent.device:
            raise NotFusedError(
                f"an end of the transformer is {weight.dtype} on {weight.device}, the latent {latent.dtype} on "
                f"{latent.device}"
            )
    weight, bias = embed.weight.detach(), embed.bias  # type: ignore[union-attr, operator]
    rows, row_bias = deembed.weight.detach(), deembed.bias  # type: ignore[union-attr, operator]

    def pixel_major(tensor: torch.Tensor) -> torch.Tensor:
        if channels_first:
            return tensor.unflatten(0, (-1, patch, patch)).movedim(0, 2)[:, :, :channels]
        return tensor.unflatten(0, (patch, patch, -1))[:, :, :channels]

    return OwnEnds(
        weight.reshape(len(weight), -1, patch, patch),
        None if bias is None else bias.detach(),
        pixel_major(rows),
        None if row_bias is None else pixel_major(row_bias.detach()),
    )
