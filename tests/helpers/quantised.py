"""Tiny pipelines whose blocks are quantised by each library that users meet, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ddit_rt
from ddit_rt.families import family_of


def _block_layers(pipe: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer of the linear layers that ``ddit_rt.quantize`` would take."""
    family = family_of(pipe)
    for path in family.target_layers(pipe.transformer, list(family.layer_groups)):
        parent, _, name = path.rpartition(".")
        yield pipe.transformer.get_submodule(parent), name, pipe.transformer.get_submodule(path)


def _by_torchao(scheme: str) -> Callable[[Any], None]:
    def quantise(pipe: Any) -> None:
        pytest.importorskip("torchao")
        ddit_rt.quantize(pipe, scheme)

    return quantise


def _gguf_linear(layer: nn.Linear, kind: str) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype)
    quant_type = gguf.GGMLQuantizationType[kind]
    codes = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().float().numpy(), quant_type))
    made.weight = GGUFParameter(codes, quant_type=quant_type)
    made.bias = layer.bias
    return made


def _by_gguf(pipe: Any) -> None:
    """Layers as diffusers loads them from a .gguf file: Q8_0, and BF16 where rows are no multiple of 32."""
    pytest.importorskip("gguf")
    for parent, name, layer in list(_block_layers(pipe)):
        parent._modules[name] = _gguf_linear(layer, "BF16" if layer.in_features % 32 else "Q8_0")


def _bitsandbytes_linear(layer: nn.Linear, bits: int) -> nn.Module:
    from bitsandbytes import nn as library

    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    values = layer.weight.data.clone()
    if bits == 4:
        made = library.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4")
        made.weight = library.Params4bit(values, requires_grad=False, quant_type="nf4")
    else:
        made = library.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.weight = library.Int8Params(values, has_fp16_weights=False, requires_grad=False)
    made.bias = layer.bias
    return made.to("cpu")  # this is what quantises


def _by_bitsandbytes(bits: int) -> Callable[[Any], None]:
    def quantise(pipe: Any) -> None:
        pytest.importorskip("bitsandbytes")
        for parent, name, layer in list(_block_layers(pipe)):
            parent._modules[name] = _bitsandbytes_linear(layer, bits)

    return quantise


LIBRARIES: dict[str, Callable[[Any], None]] = {
    "torchao-int8": _by_torchao("int8"),
    "torchao-int8-weights": _by_torchao("int8-weights"),
    "torchao-fp8-weights": _by_torchao("fp8-weights"),
    "gguf": _by_gguf,
    "bitsandbytes-4": _by_bitsandbytes(4),
    "bitsandbytes-8": _by_bitsandbytes(8),
}
"""Name -> what quantises a pipeline in place."""

MOST_OFF = {
    "torchao-int8": 0.02,
    "torchao-int8-weights": 0.01,
    "torchao-fp8-weights": 0.04,
    "gguf": 0.012,
    "bitsandbytes-4": 0.3,
    "bitsandbytes-8": 0.012,
}
"""Name -> how far off latents may be, as a share of their norm: twice what was measured on the two tiny models, plain
and coarse (0.010, 0.005, 0.019, 0.006, 0.154 and 0.006 at most)."""


def _torchao_ends(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    names = family_of(pipe).projection_names
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(pipe.transformer, config, filter_fn=lambda _, name: name in names)


def _ends(library: str, make: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], None]:
    def quantise(pipe: Any) -> None:
        pytest.importorskip(library)
        for name in family_of(pipe).projection_names:
            pipe.transformer._modules[name] = make(pipe.transformer._modules[name])

    return quantise


ENDS: dict[str, Callable[[Any], None]] = {
    "torchao": _torchao_ends,
    "gguf": _ends("gguf", lambda layer: _gguf_linear(layer, "BF16")),
    "bitsandbytes-4": _ends("bitsandbytes", lambda layer: _bitsandbytes_linear(layer, 4)),
    "bitsandbytes-8": _ends("bitsandbytes", lambda layer: _bitsandbytes_linear(layer, 8)),
}
"""Name -> what quantises a FLUX transformer's embedding and de-embedding in place."""

ENDS_MOST_OFF = {"torchao": 0.012, "gguf": 0.004, "bitsandbytes-4": 0.4, "bitsandbytes-8": 0.012}
"""Name -> how far off the weights may be that are read of them, likewise: measured 0.006, 0.0018, 0.29 and 0.006."""
