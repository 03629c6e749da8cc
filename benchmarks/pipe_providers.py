"""Who runs a pipeline: the plain one or ours, and what is added to either. What a name promises is checked to hold.

A provider's name is a sum: ``stock`` or ``ours``, then features. *graphs*: replayed from CUDA graphs. *compile*: blocks
compiled. *fp8*, *cudnn*: matrix products in FP8, attention by cuDNN. *ahead*: modulations of all steps made at the
first. *adapter*: coarse steps run a trained adapter
(here with random weights), its LoRA beside the layers, or *merged* into copies. *teacache*: TeaCache, skipping every
other step. *batch2*, *batch4*: pictures at once. ``ends`` is no pipeline but what stands before and behind it.
"""

from __future__ import annotations

from typing import Any

import pipe_models
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ddit_rt import TeaCacheConfig
from ddit_rt.families import family_of, fresh_adapter

PROVIDERS = (  # what the targets need first, and then what decides whether a record falls
    "stock",
    "ours+graphs",
    "ends",
    "ours+graphs+compile+fp8+cudnn",
    "ours+graphs+compile+fp8+cudnn+ahead",
    "ours",
    "ours+graphs+compile",
    "ours+graphs+adapter+merged",
    "ours+graphs+adapter",
    "ours+graphs+teacache",
    "stock+compile",
    "ours+graphs+compile+fp8",
    "ours+graphs+cudnn",
    "ours+graphs+fp8",
    "stock+batch2",
    "ours+graphs+batch2",
    "stock+batch4",
    "ours+graphs+batch4",
)


def features_of(provider: str) -> list[str]:
    """What a provider adds."""
    return provider.split("+")[1:]


def batch_of(provider: str) -> int:
    """Pictures at once."""
    return next((int(feature[5:]) for feature in features_of(provider) if feature.startswith("batch")), 1)


def obstacle(model: str, provider: str, device: torch.device) -> str:
    """Why a provider cannot be had here; empty if it can."""
    if "ahead" in features_of(provider) and not pipe_models.makes_ahead(model):
        return "the model has no modulations to make ahead"
    return pipe_models.fp8_obstacle(device) if "fp8" in features_of(provider) else ""


def prepared(model: str, provider: str, device: torch.device, tiny: bool) -> pipe_models.Built:
    """A pipeline with what a provider adds to its transformer, in the order that keeps each of it working.

    Raises:
        RuntimeError: something did not take effect, so that the times would be another provider's.
    """
    features = features_of(provider)
    pipe, inputs = pipe_models.build(model, device, tiny)
    if "cudnn" in features:
        # a CPU has no such attention
        backend = AttentionBackendName.NATIVE if tiny else AttentionBackendName._NATIVE_CUDNN
        pipe.transformer.set_attention_backend(backend.value)
        _check_attention(pipe.transformer, backend)
    if "fp8" in features:
        pipe_models.to_fp8(pipe.transformer)
        _check_fp8(pipe.transformer)
    if "compile" in features:
        # code made for any size would be slower at each; so there is some per size and kind of block
        torch._dynamo.config.recompile_limit = 64
        pipe.transformer.compile_repeated_blocks(dynamic=False, backend="eager" if tiny else "inductor")
    return pipe, {
        name: value.repeat_interleave(batch_of(provider), 0) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def settings(provider: str, pipe: Any, cuda: bool) -> dict[str, Any]:
    """Arguments of :func:`ddit_rt.accelerate` that a provider asks for, beside the schedule."""
    features = features_of(provider)
    asked: dict[str, Any] = {"cuda_graphs": cuda and "graphs" in features}
    if "adapter" in features:
        asked["adapter"] = fresh_adapter(family_of(pipe), pipe.transformer)
        asked["merge_adapter"] = "merged" in features
        asked["coarse"] = "adapter"
    if "ahead" in features:
        asked["modulation"] = "ahead"
    if "teacache" in features:
        # a change of 1 at every step whatever the input: random weights say nothing of how often it would skip
        asked["cache"] = TeaCacheConfig(threshold=1.5, coefficients=(0.0, 1.0))
    return asked


def _check_attention(transformer: torch.nn.Module, backend: AttentionBackendName) -> None:
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    off = {getattr(processor, "_attention_backend", None) for processor in processors} - {backend}
    if off or not processors:
        raise RuntimeError(f"attention backend {backend.value} did not take effect: {off or 'no processors'}")


def _check_fp8(transformer: torch.nn.Module) -> None:
    plain = [
        name
        for name, layer in transformer.named_modules()
        if pipe_models.in_fp8(layer, name) and type(layer.weight) in (torch.nn.Parameter, torch.Tensor)
    ]
    if plain:
        raise RuntimeError(f"FP8 did not take effect in {len(plain)} layers, {plain[0]} among them")
