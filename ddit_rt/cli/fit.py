"""``ddit-rt fit``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import ConfigError
from ..files import check_output
from .export import Export, kinds_to_export, write_export
from .models import load, load_prompts
from .options import (
    Adapter,
    CallArguments,
    Costs,
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
    read_ratios,
)
from .terminal import activity, console, importing, print_json, print_line

if TYPE_CHECKING:
    pass


def command(
    model: OptionalModel = None,
    output: Annotated[Path, typer.Option(help="File for the schedule.")] = Path("schedule.json"),
    speedup: OptionalSpeedup = None,
    quality: Annotated[float | None, typer.Option(help="Target PSNR in dB to the reference, instead.")] = None,
    reference: Reference = "plain",
    kinds: Annotated[
        str | None,
        typer.Option(help="Multiples that steps may run at, 0 to skip the model call.", show_default="1,2,4,0"),
    ] = None,
    cost_ratios: Annotated[
        str | None,
        typer.Option(
            help="What steps at 2p and 4p cost of a full one, as in 2:0.12,4:0.02, to fit as if for a larger size; "
            "such a schedule is not kept."
        ),
    ] = None,
    costs: Costs = "flops",
    adapter: Adapter = None,
    prompts: PromptSource = None,
    count: Count = 4,
    steps: Steps = 50,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    call: CallArguments = "{}",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    export: Annotated[
        Export | None,
        typer.Option(help="For another engine too, full and skipped steps: a file beside OUTPUT, or its environment."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="With --export: a schedule that was fitted before, in place of MODEL.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the schedules that are kept for later calls.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove them.")] = False,
    as_json: Json = False,
) -> None:
    """Finds the schedule of full, coarse and skipped steps that ends nearest to the reference at a given FLOP.

    It costs about eight runs per prompt, and holds for this model and number of steps. It is kept for later calls with
    a target; `ddit-rt generate --schedule FILE` or accelerate(schedule=...) runs it by name.
    """
    if schedule is not None and export is None:
        raise ConfigError(
            f"schedule={schedule!r}: a fitted schedule is only for --export, as in --export sglang; leave it out to "
            "fit one."
        )
    if (model is not None) + (schedule is not None) + list_ + clear != 1:
        raise ConfigError(
            "give one of MODEL, --schedule, --list and --clear: MODEL is 'demo', 'demo-256', 'demo-video', a folder in "
            "diffusers format, or a hub id."
        )
    if list_:
        _list(as_json)
        return
    if clear:
        _clear()
        return
    if schedule is not None:
        assert export is not None
        with importing():
            from ..schedule import FittedSchedule

        write_export(export, FittedSchedule.load(schedule), output, None, as_json)
        return
    assert model is not None
    if output.is_dir():
        output /= "schedule.json"
    check_output(output)
    further = read_object(call, "call")
    ratios = None if cost_ratios is None else read_ratios(cost_ratios, "cost-ratios")
    multiples = None if kinds is None else read_integers(kinds, "kinds", least=0)
    if export is not None:
        multiples = kinds_to_export(export, multiples, reference)

    with importing():
        from ..fitting import check_target, fit_schedule
        from ..granularity import load_adapter
        from ..pipeline import call_arguments

    check_target(speedup, quality, reference, multiples, ratios, costs)
    chosen = load_prompts(prompts, count, model)
    arguments = call_arguments(model, height, width, frames, steps, further)
    trained = None if adapter is None else load_adapter(adapter)
    pipe = load(model, dtype, device, arguments)
    with activity("fitting") as show:
        found = fit_schedule(
            pipe, chosen, speedup, multiples, seed, show, trained, quality, reference, cost_ratios=ratios, costs=costs,
            **arguments,
        )  # fmt: skip
    found.save(output)
    if export is not None:
        write_export(export, found, output, _is_guided(pipe, arguments), as_json)
        return
    if as_json:
        print_json(asdict(found))
        return
    print_line(",".join(map(str, found.schedule)))
    converged = "" if found.psnr_converged is None else f" and {found.psnr_converged:.1f} dB to the converged pictures"
    by_clock = "" if found.seconds_speedup is None else f", {found.seconds_speedup:.2f}x faster steps,"
    print_line(
        f"{output}: {found.speedup:.2f}x fewer FLOP{by_clock} at {found.psnr:.1f} dB PSNR to the plain pipeline"
        f"{converged}, mean of {found.prompts} prompts"
    )


def _is_guided(pipe: Any, call: Mapping[str, Any]) -> bool | None:
    """Whether guidance makes a call of its own; None where cache-dit knows by the pipeline's class."""
    from ..evaluate import runs_twice

    return runs_twice(pipe, call) if "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters else None


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
            f"{entry.speedup:.2f}{' s' if entry.key.costs == 'seconds' else ''}",
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
