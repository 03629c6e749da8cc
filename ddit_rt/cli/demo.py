"""``ddit-rt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .models import load
from .options import Device, Json, Seed, Steps
from .terminal import console, importing, print_json


def command(
    output: Annotated[Path, typer.Option(help="Folder for pictures, plots and the page.")] = Path("demo-out"),
    steps: Steps = 50,
    threshold: Annotated[float | None, typer.Option(help="τ; by default the value calibrated for the demo.")] = None,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each side; the median counts.")] = 2,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Shows the method on the small model that ships with the package: no download, no GPU."""
    from ..config import DDiTConfig

    if threshold is not None:
        DDiTConfig(threshold=threshold)  # refused before anything runs

    with importing():
        from ..demo import print_summary, run_showcase
        from ..pipeline import DEMO

    pipe = load(DEMO, "float32", device)
    result = run_showcase(pipe, output, steps=steps, threshold=threshold, seed=seed, repeats=repeats)
    if as_json:
        print_json(result)
    else:
        print_summary(result, console)
