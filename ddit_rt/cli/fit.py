"""``ddit-rt fit``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .models import load
from .options import (
    Adapter,
    CallArguments,
    Count,
    Device,
    Dtype,
    Frames,
    Height,
    Json,
    Model,
    PromptSource,
    Seed,
    Steps,
    TargetSpeedup,
    Width,
    read_integers,
    read_object,
)
from .terminal import activity, importing, print_json, print_line


def command(
    model: Model,
    output: Annotated[Path, typer.Option(help="File for the schedule.")] = Path("schedule.json"),
    speedup: TargetSpeedup = 2.0,
    kinds: Annotated[str, typer.Option(help="Multiples that steps may run at, 0 to skip the model call.")] = "1,2,4,0",
    adapter: Adapter = None,
    prompts: PromptSource = "demo",
    count: Count = 4,
    steps: Steps = 50,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    call: CallArguments = "{}",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Finds the schedule of full, coarse and skipped steps that stays nearest to the plain pipeline at a given FLOP.

    It costs about eight runs per prompt, and holds for this model and number of steps; `ddit-rt generate --schedule
    FILE` or accelerate(schedule=...) runs it.
    """
    further = read_object(call, "call")
    multiples = read_integers(kinds, "kinds", least=0)

    with importing():
        from ..evaluate import load_prompts
        from ..fitting import fit_schedule
        from ..granularity import load_adapter
        from ..pipeline import call_arguments
        from ..schedule import check_speedup

    check_speedup(speedup)
    chosen = load_prompts(prompts, count)
    arguments = call_arguments(model, height, width, frames, steps, further)
    trained = None if adapter is None else load_adapter(adapter)
    pipe = load(model, dtype, device, arguments)
    with activity("fitting") as show:
        found = fit_schedule(pipe, chosen, speedup, multiples, seed, show, trained, **arguments)
    found.save(output)
    if as_json:
        print_json(asdict(found))
        return
    print_line(",".join(map(str, found.schedule)))
    print_line(
        f"{output}: {found.speedup:.2f}x fewer FLOP at {found.psnr:.1f} dB PSNR to the plain pipeline, "
        f"mean of {found.prompts} prompts"
    )
