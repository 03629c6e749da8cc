"""Options that the evaluation's commands share, and how their texts are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

Model = Annotated[str, typer.Argument(help="'demo', a folder in diffusers format, or a hub id.")]
Prompts = Annotated[
    str, typer.Option(help="'demo', 'drawbench', 'partiprompts', 'coco', a hub id, or a .txt, .csv, .tsv, .json(l).")
]
Count = Annotated[int, typer.Option("--count", help="How many of the prompts.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Size = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Coarse = Annotated[str, typer.Option(help="What a coarse step computes; see DDiTConfig.")]
Tau = Annotated[float | None, typer.Option(help="τ; None finds the one for --speedup.")]
Speedup = Annotated[float, typer.Option(help="FLOP ratio to calibrate τ for.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        help="Of psnr, ssim, lpips, fid, clip, imagereward, adherence (demo model only); or 'all'. "
        "None takes psnr and ssim, and on the demo model adherence."
    ),
]
Arguments = Annotated[
    str, typer.Option(help="Further arguments of the pipeline as JSON, such as '{\"true_cfg_scale\": 1}'.")
]
Folder = Annotated[Path, typer.Option(help="Folder for tables and figures.")]
Output = Annotated[Path, typer.Option(help="Folder for rows, results, curves and gallery; continued if begun.")]


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise ConfigError(f"shard={text!r}: write i/n with i < n, as in 0/2.")
    return int(parts[0]), int(parts[1])


def read_object(text: str, name: str) -> dict[str, Any]:
    """A JSON object; `name` is the option's, for the error."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}={text!r} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={text!r}: give an object, as in '{{\"guidance_scale\": 2}}'.")
    return value


def read_integers(text: str, name: str, least: int = 1) -> list[int]:
    """Whole numbers from ``least`` on, with commas."""
    numbers = read_numbers(text, name)
    if not numbers or any(number != int(number) or number < least for number in numbers):
        raise ConfigError(f"{name}={text!r}: whole numbers from {least} on, with commas.")
    return [int(number) for number in numbers]


def read_numbers(text: str, name: str) -> list[float]:
    """Numbers with commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}={text!r}: write numbers with commas.") from None
