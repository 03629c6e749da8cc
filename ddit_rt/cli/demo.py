"""``ddit-rt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .models import load
from .options import Device, Json, Seed, StepsOfModel, folder_option
from .terminal import console, importing, print_json


def command(
    output: Annotated[Path, folder_option("Folder for pictures, plots and the page.")] = Path("demo-out"),
    video: Annotated[bool, typer.Option("--video", help="Show the video model instead.")] = False,
    steps: StepsOfModel = None,
    threshold: Annotated[
        float | None, typer.Option(help="τ of the pictures' demo; by default the value calibrated for it.")
    ] = None,
    seed: Seed = 0,
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs of each side; the median counts.", show_default="2, of videos 1")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Shows the method on the small models that ship with the package: no download, no GPU."""
    from ..config import DDiTConfig

    if threshold is not None and video:
        raise ConfigError(f"threshold={threshold:g}: the demo of videos has no threshold rule; leave out one of them.")
    if threshold is not None:
        DDiTConfig(threshold=threshold)  # refused before anything runs

    with importing():
        from ..demo import print_summary, print_video_summary, run_showcase, run_video_showcase
        from ..pipeline import DEMO, DEMO_VIDEO

    pipe = load(DEMO_VIDEO if video else DEMO, "float32", device)
    given: dict[str, Any] = {
        name: value for name, value in {"steps": steps, "repeats": repeats}.items() if value is not None
    }
    if video:
        result = run_video_showcase(pipe, output, seed=seed, **given)
    else:
        result = run_showcase(pipe, output, threshold=threshold, seed=seed, **given)
    if as_json:
        print_json(result)
    else:
        (print_video_summary if video else print_summary)(result, console)
