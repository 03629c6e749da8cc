"""``ddit-rt eval``, for the command line to mount together with ``ddit-rt analyse``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError
from .analyse import analyse
from .options import (
    Arguments,
    Count,
    Device,
    Dtype,
    Frames,
    Metrics,
    Model,
    Output,
    Prompts,
    Size,
    read_integers,
    read_object,
    read_shard,
)

console = Console()


def add_commands(app: typer.Typer) -> None:
    """Adds ``eval`` and ``analyse`` to the command line."""
    app.command("eval")(evaluate)
    app.add_typer(analyse, name="analyse")


def evaluate(
    model: Model,
    output: Output = Path("eval-out"),
    prompts: Prompts = "demo",
    count: Count = 64,
    seeds: Annotated[int, typer.Option(help="Seeds per prompt.")] = 1,
    steps: Annotated[str, typer.Option(help="Plain step counts; the first gets every method, others a few.")] = "50,28",
    methods: Annotated[Path | None, typer.Option(help="JSON list of methods instead of the standard ones.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Also run this trained adapter.")] = None,
    metrics: Metrics = None,
    height: Size = None,
    width: Size = None,
    frames: Frames = None,
    call: Arguments = "{}",
    shard: Annotated[str, typer.Option(help="'i/n': every n-th prompt from the i-th; they share the folder.")] = "0/1",
    plan_only: Annotated[bool, typer.Option("--plan", help="Only calibrate and write the plan, for shards.")] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, only write results.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measures speed and quality of every method against the plain pipeline, in one run on one machine.

    --report reads the saved pictures again, so fid, clip, imagereward and adherence can also be asked for afterwards.
    """
    from ..evaluate import APART, PAIRED, PLAN, Plan, load_prompts, read_rows, run_sweep, standard_plan, with_adapter
    from ..pipeline import DEMO, call_defaults, load_any

    index, number = read_shard(shard)
    if report_only:
        plan = Plan.read(output)
        _write(plan, output, read_rows(output), _metrics(metrics, plan.model)[1])
        return
    paired, judges = _metrics(metrics, model)
    pipe = load_any(model, dtype, device)
    if (output / PLAN).is_file():
        plan = Plan.read(output)
        if plan.model != model:
            raise ConfigError(f"{output} holds an evaluation of {plan.model}: choose another --output.")
        if adapter is not None:
            others = [
                prompt for prompt in load_prompts(prompts, len(plan.prompts) + APART) if prompt not in plan.prompts
            ]
            with console.status("fitting") as status:
                plan = with_adapter(plan, str(adapter), pipe, others[:APART] or plan.prompts[:APART], status.update)
            plan.write(output)
        console.print(
            f"continuing {output}: the plan in it is kept, --adapter adds to it; other options that would change it "
            "are not looked at"
        )
    else:
        given = {"height": height, "width": width, "num_frames": frames}
        sizes = {name: value for name, value in given.items() if value is not None}
        usable = _usable(paired, PAIRED)
        chosen = load_prompts(prompts, count + APART)
        if len(chosen) <= count:
            console.print("every prompt is evaluated: thresholds and schedules are fitted to the first of them")
        with console.status("calibrating") as status:
            plan = standard_plan(
                pipe, model, chosen[:count], read_integers(steps, "steps"), list(range(seeds)),
                {**call_defaults(model), **read_object(call, "call"), **sizes}, usable, fit_baselines=model == DEMO,
                apart=chosen[count:], methods_file=methods, adapter=adapter, progress=status.update,
            )  # fmt: skip
        plan.write(output)
    if plan_only:
        console.print(f"{output / PLAN}: {len(plan.methods)} methods, {len(plan.prompts)} prompts")
        return
    rows = run_sweep(pipe, plan, output, shard=(index, number))
    expected = len(plan.methods) * len(plan.prompts) * len(plan.seeds)
    if sum("seconds" in row for row in rows) < expected:
        console.print("other shards are not done yet; --report writes the results once they are")
        return
    _write(plan, output, rows, judges)


def _write(plan: Any, folder: Path, rows: Sequence[Any], judges: Sequence[str]) -> None:
    from ..evaluate import (
        JUDGES,
        PLAN,
        adherence_note,
        judge_pictures,
        plot_curves,
        summarise,
        table,
        write_gallery,
        write_results,
    )

    summaries = summarise(plan, rows)
    loaded = {name: judge for name in judges if (judge := _load(name, JUDGES[name])) is not None}
    judge_pictures(plan, folder, summaries, loaded)
    as_json, as_csv = write_results(plan, folder, summaries)
    curves = plot_curves(summaries, folder)
    machine = json.loads((folder / PLAN).read_text(encoding="utf-8"))["machine"]
    notes = [adherence_note(plan.prompts)] if "adherence" in loaded else []
    page = write_gallery(plan, folder, summaries, curves, machine, notes)
    for reference in sorted({summary.reference for summary in summaries}, reverse=True):
        console.print(table([s for s in summaries if s.reference == reference], f"against {reference} plain steps"))
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"{as_json}, {as_csv}, {page}, " + ", ".join(path.name for path in curves), highlight=False)


def _metrics(text: str | None, model: str) -> tuple[list[str], list[str]]:
    """Names of the metrics of pairs and of the judges."""
    from ..evaluate import JUDGES, PAIRED
    from ..pipeline import DEMO

    if text is None:
        text = "psnr,ssim,adherence" if model == DEMO else "psnr,ssim"
    names = [*PAIRED, *JUDGES] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PAIRED and name not in JUDGES]
    if unknown:
        raise ConfigError(f"metrics={','.join(unknown)}: take from {', '.join([*PAIRED, *JUDGES])}, or 'all'.")
    if model != DEMO and "adherence" in names:
        console.print("left out adherence: its reader knows the demo model's pictures alone", style="yellow")
        names.remove("adherence")
    return [name for name in names if name in PAIRED], [name for name in names if name in JUDGES]


def _usable(names: Sequence[str], loaders: dict[str, Callable[[], Any]]) -> list[str]:
    return [name for name in names if _load(name, loaders[name]) is not None]


def _load(name: str, loader: Callable[[], Any]) -> Any:
    from ..evaluate import MetricUnavailableError

    try:
        return loader()
    except MetricUnavailableError as error:
        console.print(f"left out {name}: {error}", style="yellow", markup=False, highlight=False)
        return None
