"""Weights of a transformer's blocks in few bits, by torchao: a recipe per scheme, and the scheme that suits a card."""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ConfigError
from ..families import Family, denoisers, family_of
from .lifecycle import find_accelerated

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe")

FUSED = r".*attn.*\.to_(added_)?(qkv|kv)"
"""Layers that diffusers' ``fuse_qkv_projections`` runs in place of those of the families' groups."""

SPARE = 2 * 2**30
"""Bytes of a card that graphs, activations and the decoder take beside the weights, at least."""


@dataclass(frozen=True)
class Recipe:
    """How a scheme stores and multiplies.

    Attributes:
        words: What it is, for messages and tables.
        bits: Of a weight.
        make: torchao's configuration.
        capability: Least compute capability of a CUDA device.
        elsewhere: Whether it can be had on other devices too.
        half: Whether weights have to be bfloat16 before.
        divides: What a layer's sizes have to be multiples of: those it sums over, and those it gives.
    """

    words: str
    bits: int
    make: Callable[[], Any]
    capability: tuple[int, int]
    elsewhere: bool
    half: bool
    divides: tuple[int, int]


def _fp8() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)


def _fp8_weights() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)


def _int8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int4() -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    # the packing that PyTorch's own product reads; others need further packages
    return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


# the compiler's settings are the process's, and not ours to change: set_inductor_config stays off
RECIPES: Mapping[str, Recipe] = {
    "fp8": Recipe("float8 weights and activations, scaled per row", 8, _fp8, (8, 9), False, True, (16, 16)),
    "int8": Recipe("int8 weights and activations, scaled per row", 8, _int8, (8, 0), True, False, (8, 8)),
    "fp8-weights": Recipe("float8 weights, products in 16 bits", 8, _fp8_weights, (8, 0), True, False, (1, 1)),
    "int8-weights": Recipe("int8 weights, products in 16 bits", 8, _int8_weights, (8, 0), True, False, (1, 1)),
    "int4": Recipe("int4 weights in groups of 128, products in 16 bits", 4, _int4, (8, 0), False, True, (128, 8)),
}
"""Scheme -> how it is made."""


def quantize(pipe: Pipe, scheme: str = "auto", device: str | torch.device | None = None) -> Pipe:
    """Stores the weights of the transformers' blocks in few bits, in place, before :func:`ddit_rt.accelerate`.

    Attention and feed-forward layers are quantised; embeddings, modulations, norms and outputs keep their precision, as
    do text encoders and decoder. It changes pictures slightly, at every step and whatever ``accelerate`` does, and
    :func:`ddit_rt.restore` does not undo it: load the pipeline again.

    ========== ==================================================== ==============================================
    scheme     what it is                                           cards
    ========== ==================================================== ==============================================
    ``fp8``    float8 weights and activations, scaled per row       compute capability 8.9: RTX 4090, H100, H200
    ``int8``   int8 weights and activations, scaled per row         8.0: A100, RTX 3090; CPUs, slowly
    ``int4``   int4 weights in groups of 128                        8.0, where 8 bits do not fit
    ========== ==================================================== ==============================================

    ``fp8-weights`` and ``int8-weights`` store 8 bits and multiply in 16: smaller, and no faster.

    Args:
        pipe: A supported pipeline, not accelerated and not offloaded. LoRAs may be loaded before or after.
        scheme: One of the above; ``"auto"``: fp8 where the card has it, else int8, and int4 if the transformers do not
            fit the card in 8 bits.
        device: Where the transformers go, layer by layer, so that a model that does not fit there in 16 bits can be
            quantised in the main memory; None leaves them where they are.

    Returns:
        ``pipe`` itself.

    Raises:
        ConfigError: an unknown scheme, one that the card or the weights' dtype does not allow, a pipeline that is
            accelerated, offloaded or quantised already, or no torchao. Nothing is changed then.
        UnsupportedPipelineError: the pipeline is none that ddit_rt can accelerate.
    """
    family = family_of(pipe)
    modules = {name: unwrap_module(module) for name, module in denoisers(pipe, family).items()}
    if find_accelerated(pipe) is not None:
        raise ConfigError("quantise before accelerate(): ddit_rt.restore(pipe), quantize, and accelerate again.")
    target = None if device is None else _checked_device(device)
    place = target or next(next(iter(modules.values())).parameters()).device
    check_scheme(scheme)
    layers = {name: _layers(family, module) for name, module in modules.items()}
    for name, module in modules.items():
        _check_plain(name, module, layers[name])
    chosen = suited(modules, layers, place) if scheme == "auto" else scheme
    recipe = RECIPES[chosen]
    reason = obstacle(recipe, place)
    if reason:
        raise ConfigError(f"scheme={chosen!r}: {reason}.")
    fitting = {name: _fitting(chosen, recipe, found) for name, found in layers.items()}
    _try_out(chosen, recipe, next(iter(next(iter(fitting.values())).values())), place)
    for name, module in modules.items():
        _apply(recipe, module, fitting[name], target)
        sizes = [weight.numel() for weight in (layer.weight for layer in fitting[name].values())]
        logger.info("%s: %d of %d layers in %s (%s)", name, len(sizes), len(layers[name]), chosen, recipe.words)
    return pipe


def check_scheme(scheme: str) -> None:
    """Raises:
    ConfigError: there is no such scheme.
    """
    if scheme not in (*RECIPES, "auto"):
        raise ConfigError(f"scheme={scheme!r}: use 'auto' or one of {', '.join(map(repr, RECIPES))}.")


def suited(
    modules: Mapping[str, nn.Module], layers: Mapping[str, Mapping[str, nn.Linear]], device: torch.device
) -> str:
    """The scheme that ``"auto"`` takes on a device.

    Raises:
        ConfigError: it is no CUDA device, or one that has none of the schemes.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"scheme='auto' goes by the card, and the transformer is on {device}: pass device='cuda', or a scheme."
        )
    eight = "fp8" if not obstacle(RECIPES["fp8"], device) else "int8"
    whole = sum(_bytes(module) for module in modules.values())
    saved = sum(
        layer.weight.numel() * (layer.weight.element_size() - 1) for f in layers.values() for layer in f.values()
    )
    fits = whole - saved + SPARE <= torch.cuda.get_device_properties(device).total_memory
    return eight if fits else "int4"


def obstacle(recipe: Recipe, device: torch.device) -> str:
    """Why a recipe cannot be had on a device; empty if it can."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed; pip install torchao"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < recipe.capability:
            least, here = (".".join(map(str, version)) for version in (recipe.capability, capability))
            return f"it takes compute capability {least}, this card has {here}; take 'int8' or 'int4'"
        return ""
    if not recipe.elsewhere:
        return f"it cannot be had on {device.type}; pass device='cuda', or take 'int8' or 'fp8-weights'"
    return ""


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r}: torch knows no such device; use cpu, cuda or cuda:1.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: this machine has no usable CUDA device.")
    return found


def _layers(family: Family, module: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear layer of the blocks' attention and feed-forward, beneath peft's wrapping."""
    names = list(family.target_layers(module, list(family.layer_groups)))
    names += [name for name in family.linear_layers(module) if re.fullmatch(FUSED, name)]
    found: dict[str, nn.Linear] = {}
    for name in dict.fromkeys(names):
        layer = module.get_submodule(name)
        inner = getattr(layer, "base_layer", layer)
        found[name if inner is layer else f"{name}.base_layer"] = inner
    return found


def _check_plain(name: str, module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuses a transformer whose weights are not simply there.

    Raises:
        ConfigError: with the way out.
    """
    for path, layer in module.named_modules():
        registry = getattr(layer, "_diffusers_hook", None)
        if hasattr(layer, "_hf_hook") or (registry is not None and registry.hooks):
            raise ConfigError(
                f"{name}.{path} is offloaded or hooked: quantise first, then offload or cast (pipe.remove_all_hooks() "
                "takes model offloading off)."
            )
    for path, layer in layers.items():
        weight = layer.weight
        if type(layer) is not nn.Linear or is_traceable_wrapper_subclass(weight) or not weight.dtype.is_floating_point:
            kind = type(weight).__name__ if type(layer) is nn.Linear else type(layer).__name__
            raise ConfigError(f"{name}.{path} is quantised already ({kind}): accelerate(pipe) takes it as it is.")
        if weight.element_size() < 2:
            raise ConfigError(f"{name}.{path} is stored as {weight.dtype}: load it in bfloat16, and quantise that.")


def _fitting(scheme: str, recipe: Recipe, layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The layers whose sizes the recipe can take.

    Raises:
        ConfigError: there is none, or their weights have the wrong dtype.
    """
    (inner, outer), found = recipe.divides, {}
    for path, layer in layers.items():
        if recipe.half and layer.weight.dtype != torch.bfloat16:
            raise ConfigError(
                f"scheme={scheme!r}: {path} is {layer.weight.dtype}, it has to be bfloat16. Load the pipeline with "
                "torch_dtype=torch.bfloat16."
            )
        if layer.in_features % inner == 0 and layer.out_features % outer == 0:
            found[path] = layer
    if not found:
        raise ConfigError(
            f"scheme={scheme!r}: no layer has sizes that are multiples of {inner} (inputs) and {outer} (outputs)."
        )
    return found


@torch.no_grad()
def _try_out(scheme: str, recipe: Recipe, layer: nn.Linear, device: torch.device) -> None:
    """Quantises and runs a copy of one layer, so that what does not work here shows before anything is changed.

    Raises:
        ConfigError: with torchao's own reason.
    """
    trial = copy.deepcopy(layer).requires_grad_(False).to(device)
    try:
        _quantised(recipe, nn.ModuleDict({"layer": trial}), {"layer"}, None)
        trial(torch.zeros(32, layer.in_features, dtype=layer.weight.dtype, device=device))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"scheme={scheme!r} does not run on {device}: {reason}. Take another scheme.") from error
    if not is_traceable_wrapper_subclass(trial.weight):
        raise ConfigError(f"scheme={scheme!r}: this version of torchao leaves a layer of {trial} as it is.")


def _apply(recipe: Recipe, module: nn.Module, layers: Mapping[str, nn.Linear], target: torch.device | None) -> None:
    _quantised(recipe, module, set(layers), target)
    if target is not None:
        module.to(target)
    for layer in layers.values():
        layer.requires_grad_(False)


def _quantised(recipe: Recipe, module: nn.Module, names: set[str], target: torch.device | None) -> None:
    from torchao.quantization import quantize_

    quantize_(module, recipe.make(), filter_fn=lambda _, name: name in names, device=target)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
