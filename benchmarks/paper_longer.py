"""Longer videos in the time of a plain clip, computed for Wan 2.1: what a schedule has to save, and what a step holds.

    python benchmarks/paper_longer.py [--into benchmarks/results/on-paper/longer.json]

Seconds are those of ``paper_count.py``: every kernel of a denoising step on a card's data sheet. Memory is that of the
tensors which live at once in a transformer call, beside the weights; attention keeps no matrix of scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from on_paper import GPUS
from paper_count import Gpu, Row, rows_of
from pipe_models import WAN_SIZES, as_loaded, wan_transformer

from ddit_rt.families import family_of

STEPS, TEXT, CALLS = 50, 512, 2  # guidance makes two transformer calls a step
PLAIN = 81
FRAMES = (81, 121, 161, 241, 321)
SIZES = {"1.3B": (480, 832), "14B": (720, 1280)}  # pixels, as each is usually run


@dataclass(frozen=True)
class Length:
    """A video of a length, in denoising steps of one card.

    Attributes:
        frames: Of the video.
        tokens: At the model's own patch size.
        seconds: Of a plain run, and of a run of coarse steps alone, by multiple.
        bytes: Live at once in a transformer call, by multiple.
    """

    frames: int
    tokens: int
    seconds: dict[int, float]
    bytes: dict[int, int]


def length_of(size: str, frames: int, gpu: Gpu) -> Length:
    """Computes one length for a size of :data:`WAN_SIZES`."""
    height, width = SIZES[size]
    transformer = wan_transformer(size, torch.device("meta"), torch.bfloat16)
    as_loaded(transformer)
    pipe = WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer)
    inputs = {"height": height, "width": width, "num_frames": frames}
    found: dict[int, Row] = rows_of("wan", pipe, inputs, TEXT)
    geometry = family_of(pipe).geometry(pipe, height, width, frames)
    seconds = {k: STEPS * CALLS * row.seconds(gpu, True, True) for k, row in found.items()}
    return Length(frames, geometry.tokens(1), seconds, {k: row.peak_bytes for k, row in found.items()})


def line_of(length: Length, plain: Length) -> dict[str, Any]:
    """What a run of a length may spend in the time of the plain clip: full steps, by what the others are."""
    budget = plain.seconds[1] / STEPS
    full = length.seconds[1] / STEPS
    left = {"skipped": STEPS * budget / full}
    for k in (2, 4):
        coarse = length.seconds[k] / STEPS
        left[f"{k}p"] = STEPS * (budget - coarse) / (full - coarse)
    return {
        "frames": length.frames,
        "tokens": length.tokens,
        "seconds": round(length.seconds[1], 2),
        "speedup": round(full / budget, 3),
        "full_steps": {name: max(int(steps + 1e-9), 0) for name, steps in left.items()},
        "gigabytes": {str(k): round(count / 1e9, 2) for k, count in length.bytes.items()},
    }


def result(gpu: Gpu) -> dict[str, Any]:
    """All lengths of both sizes."""
    found: dict[str, Any] = {"gpu": gpu.name, "steps": STEPS, "models": {}}
    for size in WAN_SIZES:
        lengths = [length_of(size, frames, gpu) for frames in FRAMES]
        height, width = SIZES[size]
        lines = [line_of(length, lengths[0]) for length in lengths]
        found["models"][size] = {"height": height, "width": width, "lines": lines}
    return found


def table(found: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        f"Computed for the {found['gpu']}, bf16, graphs and compiled blocks, {found['steps']} steps with guidance; "
        "full steps that are left if the clip is to take as long as the plain one of the first line, by what the other "
        "steps are.",
        "",
        "| Wan 2.1 | frames | tokens | plain, s | speed-up wanted | full steps, others skipped / 2p / 4p | "
        "GB live in a call at p / 2p / 4p |",
        "|---" * 7 + "|",
    ]
    for size, model in found["models"].items():
        for line in model["lines"]:
            left = " / ".join(str(steps) for steps in line["full_steps"].values())
            live = " / ".join(f"{count:.2f}" for count in line["gigabytes"].values())
            lines.append(
                f"| {size}, {model['width']} x {model['height']} | {line['frames']} | {line['tokens']:,} | "
                f"{line['seconds']:.0f} | {line['speedup']:.2f}x | {left} | {live} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default=GPUS[-1].name, choices=[gpu.name for gpu in GPUS])
    parser.add_argument("--into", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    found = result(next(gpu for gpu in GPUS if gpu.name == options.gpu))
    if options.into is not None:
        options.into.parent.mkdir(parents=True, exist_ok=True)
        options.into.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
