"""``ddit-rt calibrate``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from .models import load, shipped_prompts
from .options import (
    Coarse,
    Device,
    Dtype,
    Frames,
    Height,
    Json,
    Model,
    Order,
    PromptList,
    Quantile,
    Seed,
    StepsOfModel,
    TargetSpeedup,
    Width,
)
from .terminal import activity, console, importing, print_json, print_line


def command(
    model: Model,
    speedup: TargetSpeedup = 1.5,
    prompt: PromptList = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: StepsOfModel = None,
    quantile: Quantile = 0.4,
    order: Order = 3,
    coarse: Coarse = "auto",
    trials: Annotated[int, typer.Option(help="Values of τ to try.", min=1)] = 6,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Suggests the τ that gives a target speed-up, from a few runs."""
    from ..config import DDiTConfig

    settings: dict[str, Any] = {"quantile": quantile, "order": order, "coarse": coarse}
    DDiTConfig(**settings)  # bad settings are refused before a large model is loaded

    with importing():
        from ..fitting import calibrate
        from ..pipeline import call_arguments
        from ..schedule import check_speedup

    check_speedup(speedup)
    call = call_arguments(model, height, width, frames, steps)
    missing = "no --prompt: give one or more that resemble your use, τ depends on them."
    prompts = prompt or list(shipped_prompts(model, missing).values())
    pipe = load(model, dtype, device, call)
    with activity("calibrating") as show:
        found = calibrate(pipe, prompts, speedup, settings, trials, seed, show, **call)
    if as_json:
        print_json(asdict(found))
        return
    table = Table("τ", "FLOP speed-up", "PSNR to plain, dB")
    for trial in found.trials:
        table.add_row(f"{trial.threshold:.3e}", f"{trial.speedup:.2f}", f"{trial.psnr:.1f}")
    console.print(table)
    print_line(f"threshold={found.threshold:.3e} gives {found.speedup:.2f}x at {found.psnr:.1f} dB")
