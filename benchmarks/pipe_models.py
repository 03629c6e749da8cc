"""FLUX.1-dev and Wan 2.1 1.3B with random weights, made where they run, and what can be done to them beforehand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from ddit_rt.families import FAMILIES, family_of

Built = tuple[Any, dict[str, Any]]


@contextmanager
def made(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the context weights are made where they stay, and as what they stay: there are 12 billion of them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _flux(device: torch.device, dtype: torch.dtype, tiny: bool, deep: bool) -> Built:
    small = {
        "in_channels": 16,
        "num_layers": 19 if deep else 1,
        "num_single_layers": 38 if deep else 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    with made(device, dtype):
        transformer = FluxTransformer2DModel(guidance_embeds=True, **(small if tiny else {}))
        # never decodes: the pipeline only asks it for its scale
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4
        )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, None, None, None, None, transformer
    )
    config = transformer.config
    return pipe, {
        "prompt_embeds": torch.randn(1, 6 if tiny else 512, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "height": 64 if tiny else 1024,
        "width": 64 if tiny else 1024,
    }


WAN_SIZES = {
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "14B": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
}
"""Of Wan 2.1's transformers, where they differ."""


def wan_transformer(size: str, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """Wan 2.1's transformer of a size of :data:`WAN_SIZES`, with random weights."""
    with made(device, dtype):
        return WanTransformer3DModel(qk_norm="rms_norm_across_heads", **WAN_SIZES[size])


def _wan(device: torch.device, dtype: torch.dtype, tiny: bool, deep: bool) -> Built:
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
    if tiny:
        with made(device, dtype):
            transformer = WanTransformer3DModel(num_layers=30 if deep else 1, **small)
    else:
        transformer = wan_transformer("1.3B", device, dtype)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer)
    embeds = torch.randn(1, 6 if tiny else 512, transformer.config.text_dim, device=device, dtype=dtype)
    return pipe, {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": -embeds,
        "height": 64 if tiny else 480,
        "width": 96 if tiny else 832,
        "num_frames": 5 if tiny else 81,
    }


@dataclass(frozen=True)
class Model:
    """A published configuration and how it is usually run.

    Attributes:
        title: For tables.
        steps: Denoising steps.
        more_steps: Those of a second run, or None.
    """

    title: str
    transformer: type[torch.nn.Module]
    make: Callable[[torch.device, torch.dtype, bool, bool], Built]
    steps: int
    more_steps: int | None


MODELS = {
    "flux": Model("FLUX.1-dev, 1024 x 1024", FluxTransformer2DModel, _flux, 28, 50),
    "wan": Model("Wan 2.1 1.3B, 832 x 480, 81 frames, with guidance", WanTransformer3DModel, _wan, 50, None),
}


def build(model: str, device: torch.device, tiny: bool, deep: bool = False) -> Built:
    """A pipeline without encoders and decoder, and the arguments of its call; the number of steps is left open.

    Args:
        model: Key of :data:`MODELS`.
        device: Where weights are made.
        tiny: Narrow, with a layer of each kind, in float32.
        deep: If tiny, with all layers.
    """
    dtype = torch.float32 if tiny else torch.bfloat16
    pipe, inputs = MODELS[model].make(device, dtype, tiny, deep)
    as_loaded(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**inputs, "output_type": "latent"}


def as_loaded(transformer: Any) -> None:
    """Leaves a transformer as ``from_pretrained`` does: some of its modules in float32, and ready to run."""
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()
    transformer.eval().requires_grad_(False)


def flops(pipe: Any, inputs: dict[str, Any]) -> dict[int, float]:
    """Multiple -> FLOP of one model run, by the package's estimate."""
    family = family_of(pipe)
    geometry = family.geometry(pipe, inputs["height"], inputs["width"], inputs.get("num_frames", 1))
    return {k: family.flops(pipe.transformer, geometry, k, inputs["prompt_embeds"].shape[1]) for k in (1, 2, 4)}


def makes_ahead(model: str) -> bool:
    """Whether a model's modulations can be made ahead."""
    known = MODELS[model].transformer
    return any(family.modulation_inputs for family in FAMILIES if family.transformer_class is known)


def fp8_obstacle(device: torch.device) -> str:
    """Why there can be no FP8 here; empty if there can."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "the GPU has no FP8 matrix products (compute capability below 8.9)"
    return ""


def to_fp8(transformer: torch.nn.Module) -> None:
    """What ``ddit_rt.quantize(pipe, "fp8")`` does, in a dry run too: weights and activations of the blocks' layers in
    FP8, scaled per row; modulations and the ends keep their precision."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # the compiler's settings are the process's: what other rows compile must not depend on this one
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(transformer, config, filter_fn=in_fp8)
    transformer.requires_grad_(False)


def in_fp8(layer: torch.nn.Module, name: str) -> bool:
    """Whether :func:`to_fp8` takes a layer of that name."""
    return isinstance(layer, torch.nn.Linear) and "blocks." in name and "norm" not in name
