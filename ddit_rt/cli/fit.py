"""``ddit-rt fit``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import ConfigError
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
    OptionalModel,
    OptionalSpeedup,
    PromptSource,
    Reference,
    Seed,
    Steps,
    Width,
    read_integers,
    read_object,
)
from .terminal import activity, console, importing, print_json, print_line


def command(
    model: OptionalModel = None,
    output: Annotated[Path, typer.Option(help="File for the schedule.")] = Path("schedule.json"),
    speedup: OptionalSpeedup = None,
    quality: Annotated[float | None, typer.Option(help="Target PSNR in dB to the reference, instead.")] = None,
    reference: Reference = "plain",
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
    list_: Annotated[bool, typer.Option("--list", help="List the schedules that are kept for later calls.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove them.")] = False,
    as_json: Json = False,
) -> None:
    """Finds the schedule of full, coarse and skipped steps that ends nearest to the reference at a given FLOP.

    It costs about eight runs per prompt, and holds for this model and number of steps. It is kept for later calls with
    a target; `ddit-rt generate --schedule FILE` or accelerate(schedule=...) runs it by name.
    """
    if (model is not None) + list_ + clear != 1:
        raise ConfigError("give one of MODEL, --list and --clear: 'demo', a folder in diffusers format, or a hub id.")
    if list_:
        _list(as_json)
        return
    if clear:
        _clear()
        return
    assert model is not None
    further = read_object(call, "call")
    multiples = read_integers(kinds, "kinds", least=0)

    with importing():
        from ..evaluate import load_prompts
        from ..fitting import check_target, fit_schedule
        from ..granularity import load_adapter
        from ..pipeline import call_arguments

    check_target(speedup, quality, reference, multiples)
    chosen = load_prompts(prompts, count)
    arguments = call_arguments(model, height, width, frames, steps, further)
    trained = None if adapter is None else load_adapter(adapter)
    pipe = load(model, dtype, device, arguments)
    with activity("fitting") as show:
        found = fit_schedule(
            pipe, chosen, speedup, multiples, seed, show, trained, quality, reference, **arguments
        )  # fmt: skip
    found.save(output)
    if as_json:
        print_json(asdict(found))
        return
    print_line(",".join(map(str, found.schedule)))
    converged = "" if found.psnr_converged is None else f" and {found.psnr_converged:.1f} dB to the converged pictures"
    print_line(
        f"{output}: {found.speedup:.2f}x fewer FLOP at {found.psnr:.1f} dB PSNR to the plain pipeline{converged}, "
        f"mean of {found.prompts} prompts"
    )


def _list(as_json: bool) -> None:
    """The user's store, the newest schedule last."""
    with importing():
        from ..schedule import ScheduleStore

    store = ScheduleStore()
    entries = sorted(store.own_entries(), key=lambda entry: entry.saved)
    if as_json:
        print_json([entry.to_dict() for entry in entries])
        return
    if not entries:
        print_line(f"{store.root} holds no schedules")
        return
    table = Table(box=SIMPLE_HEAD, padding=0)  # 80 columns have to do
    table.add_column("model", overflow="fold")
    for heading in ("steps", "guidance", "size", "reference", "speed-up", "dB", "saved"):
        table.add_column(heading, no_wrap=True)
    for entry in entries:
        table.add_row(
            (entry.name or entry.key.model[:12]) + (" + adapter" if entry.key.adapter else ""),
            str(entry.key.steps),
            entry.key.guidance,
            entry.key.size,
            entry.key.reference,
            f"{entry.fitted.speedup:.2f}",
            f"{entry.quality:.1f}",
            f"{entry.saved.astimezone():%Y-%m-%d}",
        )
    console.print(table)
    print_line(str(store.root))


def _clear() -> None:
    with importing():
        from ..schedule import ScheduleStore

    store = ScheduleStore()
    count = store.clear()
    print_line(f"{store.root}: removed {count} schedule{'' if count == 1 else 's'}")
