"""Which model this is: a short text that is the same wherever the same weights are loaded in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .weights import kept

_HEX_DIGITS = 32
_WHOLE = 4096  # tensors of up to so many values are read whole: biases and norms, a few MB of a large model
_SAMPLES = 16  # of a larger tensor; training moves all of its values, so that few tell as much as all
_WRAPPED = ("base_layer", "_orig_mod")  # where peft's layers and torch.compile's module keep what they wrap
# values are compared as bits: 8-bit floats cannot be gathered everywhere
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(*modules: nn.Module) -> str:
    """A text that tells models apart by class, configuration and weights, without reading large weights whole.

    Of every parameter and every buffer that is saved, it takes name, shape and dtype, and values: all of a small
    tensor, 16 at fixed places of a large one. A single changed value of a large tensor can go unseen; a model that was
    trained further does not.

    - The same weights in another dtype, or quantised, are another model: their predictions differ.
    - A LoRA that peft holds beside the weights is left out, switched on or off: the fingerprint is the base model's.
      One that is fused into the weights counts, as it cannot be told from them.
    - ``torch.compile``, hooks, offloading and ``ddit_rt.accelerate`` change nothing.
    - Of a quantised tensor it takes the tensors that it is made of; of one whose values cannot be read, name, shape
      and dtype alone.

    Args:
        *modules: The transformers of a pipeline, in the order of its components. An adapter of ours works as well.

    Returns:
        32 hexadecimal digits, equal in every process.

    Raises:
        ConfigError: there is no module, or one has weights on the meta device that are offloaded nowhere.
    """
    if not modules:
        raise ConfigError("modules=(): give at least one model to take the fingerprint of.")
    digest = hashlib.sha256()
    for module in modules:
        layers = list(_layers(module, ""))
        model = layers[0][1]
        _add(digest, [type(model).__name__, _configuration(model)])
        for name, tensor in sorted(_weights(layers), key=lambda pair: pair[0]):
            if tensor.is_meta:
                raise ConfigError(
                    f"{type(model).__name__}.{name} is on the meta device and has no values: load the weights first."
                )
            _add(digest, [name, list(tensor.shape), str(tensor.dtype)], _values(tensor))
    return digest.hexdigest()[:_HEX_DIGITS]


def _add(digest: Any, description: list[Any], values: bytes = b"") -> None:
    # what JSON does not know is named by its class: its own text may hold an address
    text = json.dumps([*description, len(values)], sort_keys=True, default=lambda value: type(value).__name__)
    digest.update(text.encode() + b"\n" + values)


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, as if nothing were wrapped."""
    for name in _WRAPPED:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            yield from _layers(inner, path)
            return
    yield path, module
    for name, child in module.named_children():
        yield from _layers(child, f"{path}{name}.")


def _weights(layers: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, torch.Tensor]]:
    for path, layer in layers:
        buffers = (name for name in layer._buffers if name not in layer._non_persistent_buffers_set)
        for name in (*layer._parameters, *buffers):
            tensor = kept(layer, name)
            if tensor is not None:
                yield path + name, tensor


def _configuration(model: nn.Module) -> dict[str, Any]:
    """What the model was built with. Bookkeeping is left out, and what is off: newer versions add settings that are."""
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return {}
    skipped = ("quantization_config",)  # the weights say it
    return {
        str(name): value
        for name, value in config.items()
        if not str(name).startswith("_") and name not in skipped and value is not None and value is not False
    }


def _values(tensor: torch.Tensor) -> bytes:
    """The bits of some values, at places that depend on the shape alone."""
    if hasattr(tensor, "__tensor_flatten__"):  # made of other tensors, as torchao's
        return b"".join(_values(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.is_quantized:  # of torch's own dtypes; their views cannot be indexed
        return _values(tensor.int_repr())
    try:
        bits = tensor.detach().as_subclass(torch.Tensor).view(_BITS[tensor.element_size()])
        count = bits.numel()
        if count <= _WHOLE:
            chosen = bits.reshape(-1)
        else:
            # multiples of the golden ratio: spread over rows and columns whatever the shape
            places = [(i * 0x9E3779B97F4A7C15 % 2**64) * count >> 64 for i in range(_SAMPLES)]
            # by coordinates: flattening a transposed weight would copy it
            chosen = bits[torch.unravel_index(torch.tensor(places, device=bits.device), bits.shape)]
        return chosen.cpu().numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError, KeyError):
        return b""
