"""Tiny FLUX pipelines in many settings, and what fresh ones of the same settings compute."""

from __future__ import annotations

import functools
from typing import Any

import torch
from adapters import trained
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline, UniPCMultistepScheduler
from peft import LoraConfig
from tiny import flux, flux_inputs, latents_of, negative, picture

import ddit_rt


def mixed(index: int, patch_std: Any) -> int:
    """A schedule for calls of any length."""
    return (1, 2, 4, 1)[index % 4]


def with_skips(index: int, patch_std: Any) -> int:
    return (1, 0, 2, 4)[index % 4]


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"threshold": 0},
    "mixed": {"schedule": mixed},
    "signal": {"threshold": 0.3, "order": 1, "initial_full_steps": 0},
    "naive": {"schedule": mixed, "coarse": "naive"},
    "skips": {"schedule": with_skips, "coarse": "band-split"},
    "adapter": {"schedule": mixed},
    "teacache": {"schedule": mixed, "cache": ddit_rt.TeaCacheConfig(threshold=0.5, coefficients=(1.0, 0.0))},
}
REQUESTS = ("small", "guided")
SCHEDULERS = ("euler", "unipc")
LORA = "mine"


def request(name: str) -> dict[str, Any]:
    """Arguments of a call."""
    if name == "guided":
        return negative(flux_inputs(height=48, width=32, steps=3))
    return flux_inputs(height=40, width=64, steps=4)


def scheduler(name: str) -> Any:
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def make(scheduler_name: str = "euler", lora: bool = False) -> Any:
    pipe = flux()
    pipe.scheduler = scheduler(scheduler_name)
    if lora:
        add_lora(pipe)
    return pipe


def add_lora(pipe: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "proj_mlp", "x_embedder"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name=LORA)


def derived(pipe: Any, kind: str) -> Any:
    """Another pipeline of the same components: "image" starts from a picture, "twin" is of the same class."""
    other = FluxImg2ImgPipeline.from_pipe(pipe) if kind == "image" else FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def accelerate(pipe: Any, name: str) -> Any:
    with torch.random.fork_rng():
        adapter = trained(make()) if name == "adapter" else None  # whatever LoRA is there: its ends would know of it
    return ddit_rt.accelerate(pipe, adapter, SETTINGS[name])


def call(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    """Latents of request ``name``."""
    inputs = request(name)
    if isinstance(pipe, FluxImg2ImgPipeline):
        more = {"image": picture(inputs["height"], inputs["width"]), "strength": 0.8, **more}
    return latents_of(pipe, {**inputs, **more})


@functools.cache
def expected(
    settings: str | None, name: str, scheduler_name: str, lora: bool, kind: str | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Latents and schedule of request ``name`` on a fresh pipeline; ``settings`` None leaves it plain."""
    pipe = make(scheduler_name, lora)
    if kind is not None:
        pipe = derived(pipe, kind)
    if settings is not None:
        accelerate(pipe, settings)
    latents = call(pipe, name)
    return latents, [] if settings is None else ddit_rt.report(pipe).schedule


def transformer_call() -> dict[str, torch.Tensor]:
    """Arguments of a direct call of the transformer."""
    generator = torch.Generator().manual_seed(11)
    return {
        "hidden_states": torch.randn(1, 64, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "pooled_projections": torch.randn(1, 12, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32),
        "txt_ids": torch.zeros(5, 3),
    }


@torch.no_grad()
def direct(pipe: Any) -> torch.Tensor:
    return pipe.transformer(**transformer_call()).sample


@functools.cache
def expected_direct(lora: bool) -> torch.Tensor:
    return direct(make(lora=lora))


def patches(pipe: Any) -> list[str]:
    """What acceleration leaves on the components."""
    found = [f"transformer.{name}" for name in ("forward", "_ddit_pipeline") if name in pipe.transformer.__dict__]
    names = ("step", "set_timesteps", "_ddit_pipeline")
    return found + [f"scheduler.{name}" for name in names if name in pipe.scheduler.__dict__]
