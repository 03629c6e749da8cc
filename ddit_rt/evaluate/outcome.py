"""One run of a pipeline: its picture or video, what it cost, and what each step did."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image

from ..accelerate import accelerated, report, restore
from ..schedule import Report
from .flops import counted_flops
from .peers import peer_enabled


@dataclass
class Outcome:
    """What one pipeline call gave.

    Attributes:
        frames: (B, 3, H, W) or (B, F, 3, H, W) float32 in [0, 1], on the CPU.
        seconds: Wall clock of the whole call, text encoding and VAE included.
        report: Steps of the call; None for the plain pipeline and for a peer.
        cached: Steps that a peer took from its cache, if it says so; with two transformer runs per step, their mean.
        flops: Of the transformer, as executed; None where they were not counted.
    """

    frames: torch.Tensor
    seconds: float
    report: Report | None
    cached: float | None = None
    flops: float | None = None


def generate(
    pipe: Any,
    settings: Mapping[str, Any] | None,
    seed: int,
    *,
    warm_ups: int = 0,
    count_flops: bool = False,
    **call: Any,
) -> Outcome:
    """Calls ``pipe`` once, plain or accelerated, from the noise that ``seed`` gives.

    Args:
        pipe: A pipeline; whatever acceleration it has is replaced, and it is left plain.
        settings: Arguments of :func:`ddit_rt.accelerate`, ``{"peer": {...}}`` for one of
            :data:`~ddit_rt.evaluate.peers.PEERS`, or None for the plain pipeline.
        seed: Of a CPU generator, so that all devices start from the same noise.
        warm_ups: The same call so many times before the one that counts; on CUDA the first captures graphs.
        count_flops: Count what the transformer executes, without CUDA graphs. Such a run is slow: no timing.
        **call: Arguments of the pipeline.

    Raises:
        ConfigError: the peer is not installed, or settings are out of range.
    """
    restore(pipe)
    peer = settings.get("peer") if settings is not None else None
    own = settings if peer is None else None
    with ExitStack() as stack:
        cached = stack.enter_context(peer_enabled(pipe, peer, call)) if peer is not None else None
        flops = stack.enter_context(counted_flops(pipe)) if count_flops else None
        if own is not None:
            stack.enter_context(accelerated(pipe, **{**own, "cuda_graphs": False} if count_flops else own))
        frames, seconds = _timed(pipe, seed, call, warm_ups)
        return Outcome(
            frames,
            seconds,
            report(pipe) if own is not None else None,
            cached() if cached is not None else None,
            flops.total if flops is not None else None,
        )


def _timed(pipe: Any, seed: int, call: Mapping[str, Any], warm_ups: int) -> tuple[torch.Tensor, float]:
    for _ in range(warm_ups):
        pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="pt")
    arguments = {**call, "generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    output = pipe(**arguments)
    frames = (output.frames if hasattr(output, "frames") else output.images).float().cpu()  # waits for the device
    return frames, time.perf_counter() - began


def save(frames: torch.Tensor, path: Path) -> Path:
    """Writes the first picture (or video) of a batch.

    Args:
        frames: As in :class:`Outcome`.
        path: Picture file, or for videos .gif or .mp4 (mp4 needs imageio with ffmpeg); a video under a picture's name
            becomes a .gif beside it.

    Returns:
        The file written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (frames[0] * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).numpy()
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(path)
        return path
    if path.suffix == ".mp4":
        export_to_video(list(pixels / 255.0), str(path), fps=16)
        return path
    path = path.with_suffix(".gif")
    export_to_gif([Image.fromarray(frame) for frame in pixels], str(path), fps=16)
    return path
