"""Pipelines by name: the demo model, a local folder, or a hub id; with call defaults and size checks for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..errors import ConfigError
from ..families import family_of

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_any(model: str, dtype: str | None = None, device: str | None = None) -> Any:
    """Loads a pipeline for the command line.

    Args:
        model: ``"demo"``, a folder in diffusers format, or a hub id.
        dtype: "float32", "bfloat16" or "float16"; None takes bfloat16 on CUDA and float32 elsewhere.
        device: Of torch; None takes CUDA where there is one.

    Raises:
        ConfigError: an unknown dtype or device.
        UnsupportedPipelineError: the pipeline is none that ddit_rt can accelerate.
    """
    device = device or default_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: this machine has no usable CUDA device; use --device cpu.")
    name = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r}: use one of {', '.join(DTYPES)}.")
    if model == DEMO:
        from ..demo import load_pipeline

        pipe: Any = load_pipeline(DTYPES[name])
    else:
        if (Path(model).is_absolute() or model.startswith(".")) and not (Path(model) / "model_index.json").is_file():
            raise ConfigError(f"{model!r} holds no pipeline: a folder in diffusers format has a model_index.json.")
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=DTYPES[name])
    family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def call_defaults(model: str) -> dict[str, Any]:
    """Arguments that a call of ``model`` needs beyond diffusers' defaults; the demo model has sizes of its own."""
    if model == DEMO:
        from ..demo import CALL_DEFAULTS

        return dict(CALL_DEFAULTS)
    return {}


def call_arguments(
    model: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    further: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Arguments of a call of ``model``: its :func:`call_defaults`, and over them whatever is given and not None.

    Args:
        model: As for :func:`load_any`.
        height, width: Pixels.
        frames: Of a video.
        steps: Denoising steps.
        further: Arguments by the pipeline's own names.
    """
    sizes = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
    given = {name: value for name, value in {**further, **sizes}.items() if value is not None}
    return {**call_defaults(model), **given}


def check_size(pipe: Any, height: int, width: int) -> None:
    """Refuses picture sizes that the pipeline would silently change.

    Raises:
        ConfigError: names the nearest sizes that work.
    """
    family = family_of(pipe)
    geometry = family.geometry(pipe, 1024, 1024)
    side = 1024 // (geometry.height // geometry.patch)
    for name, value in (("height", height), ("width", width)):
        if value < side or value % side:
            below = max(side, value // side * side)
            raise ConfigError(
                f"{name}={value}: this model takes multiples of {side} pixels, as in {below} or {below + side}."
            )
