"""One run of a pipeline, plain or accelerated: its picture or video, what it cost, and what each step did."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image

from ..errors import ConfigError
from ..pipeline import accelerated, report, restore
from ..schedule import Report


@dataclass
class Outcome:
    """What one pipeline call gave.

    Attributes:
        frames: (B, 3, H, W) or (B, F, 3, H, W) float32 in [0, 1], on the CPU.
        seconds: Wall clock of the whole call, text encoding and VAE included.
        report: Steps of the call; None for the plain pipeline and for another library.
        cached: Steps that another library took from its cache, if it says so; with two transformer runs per step,
            their mean.
        flops: Of the transformer, as executed; None where they were not counted.
    """

    frames: torch.Tensor
    seconds: float
    report: Report | None
    cached: float | None = None
    flops: float | None = None


def generate(pipe: Any, settings: Mapping[str, Any] | None, seed: int, **call: Any) -> Outcome:
    """Calls ``pipe`` once, plain or accelerated, from the noise that ``seed`` gives.

    Args:
        pipe: A pipeline; whatever acceleration it has is replaced, and it is left plain.
        settings: Arguments of :func:`ddit_rt.accelerate`, or None for the plain pipeline.
        seed: Of a CPU generator, so that all devices start from the same noise.
        **call: Arguments of the pipeline.
    """
    if settings is None:
        restore(pipe)
        return Outcome(*timed_call(pipe, seed, call), None)
    with accelerated(pipe, **settings):
        return Outcome(*timed_call(pipe, seed, call), report(pipe))


def denoise(pipe: Any, seed: int, call: Mapping[str, Any]) -> None:
    """Calls ``pipe`` for the sake of its steps: as it is, from the noise that ``seed`` gives, and decodes nothing.

    Args:
        pipe: A pipeline, plain or accelerated.
        seed: As for :func:`generate`.
        call: Arguments of the pipeline, but for generator and output type.
    """
    pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="latent")


def timed_call(pipe: Any, seed: int, call: Mapping[str, Any], warmup_runs: int = 0) -> tuple[torch.Tensor, float]:
    """Frames as in :class:`Outcome` and wall-clock seconds of a call, after ``warmup_runs`` untimed ones."""
    for _ in range(warmup_runs):
        pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="pt")
    arguments = {**call, "generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    output = pipe(**arguments)
    frames = (output.frames if hasattr(output, "frames") else output.images).float().cpu()  # waits for the device
    return frames, time.perf_counter() - began


def can_encode() -> bool:
    """Whether MP4 files can be written: imageio with ffmpeg is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))


def save(frames: torch.Tensor, path: Path, fps: int = 16) -> Path:
    """Writes the first picture (or video) of a batch.

    Args:
        frames: As in :class:`Outcome`.
        path: Picture file, or for videos .gif or .mp4 (mp4 needs imageio with ffmpeg); a video under a picture's name
            becomes a .gif beside it.
        fps: Frames per second of a video.

    Returns:
        The file written.

    Raises:
        ConfigError: an .mp4 is asked for, and there is nothing to encode it.
    """
    if path.suffix == ".mp4" and not can_encode():
        raise ConfigError(f"{path.name}: .mp4 needs imageio with ffmpeg: pip install 'ddit-rt[eval]', or write a .gif.")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (frames[0] * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).numpy()
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(path)
        return path
    if path.suffix == ".mp4":
        # a block of 1: the encoder would scale other sizes to multiples of 16
        export_to_video(list(pixels / 255.0), str(path), fps=fps, macro_block_size=1)
        return path
    path = path.with_suffix(".gif")
    export_to_gif([Image.fromarray(frame) for frame in pixels], str(path), fps=fps)
    return path
