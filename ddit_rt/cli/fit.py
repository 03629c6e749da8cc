"""``ddit-rt fit``, for the command line to mount."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Arguments, Device, Dtype, Frames, Model, Prompts, Seed, Size, Steps, read_integers, read_object

console = Console()


def add_commands(app: typer.Typer) -> None:
    """Adds ``fit`` to the command line."""
    app.command("fit")(fit)


def fit(
    model: Model,
    output: Annotated[Path, typer.Option(help="File for the schedule.")] = Path("schedule.json"),
    speedup: Annotated[float, typer.Option(help="Wanted ratio of FLOP, full over accelerated.")] = 2.0,
    kinds: Annotated[str, typer.Option(help="Multiples that steps may run at, 0: no model call.")] = "1,2,4,0",
    adapter: Annotated[str | None, typer.Option(help="What coarse steps run: a file, or a hub id.")] = None,
    prompts: Prompts = "demo",
    count: Annotated[int, typer.Option("--count", help="How many of the prompts; each costs about 8 runs.")] = 4,
    steps: Steps = 50,
    height: Size = None,
    width: Size = None,
    frames: Frames = None,
    call: Arguments = "{}",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Finds the schedule of full, coarse and skipped steps that stays nearest to the plain pipeline at a given FLOP.

    It holds for this model and number of steps; `ddit-rt generate --schedule FILE` or accelerate(schedule=...) runs it.
    """
    from ..evaluate import load_prompts
    from ..fitting import fit_schedule
    from ..pipeline import call_arguments, load_any

    chosen = load_prompts(prompts, count)
    arguments = call_arguments(model, height, width, frames, steps, read_object(call, "call"))
    numbers = read_integers(kinds, "kinds", least=0)
    pipe = load_any(model, dtype, device)
    with console.status("fitting") as status:
        found = fit_schedule(pipe, chosen, speedup, numbers, seed, status.update, adapter, **arguments)
    found.save(output)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    console.print(",".join(map(str, found.schedule)), highlight=False)
    console.print(
        f"{output}: {found.speedup:.2f}x fewer FLOP at {found.psnr:.1f} dB PSNR to the plain pipeline, "
        f"mean of {found.prompts} prompts"
    )
