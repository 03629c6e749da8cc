"""``ddit-rt eval``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .models import load, load_prompts
from .options import (
    Adapter,
    CallArguments,
    Device,
    Dtype,
    Frames,
    Height,
    Model,
    PromptSource,
    Width,
    folder_option,
    read_integers,
    read_object,
    read_shard,
)
from .quiet import hide_loading_bars
from .terminal import activity, console, importing, note, print_line

_COUNT = 64
"""Prompts, where no number is given."""


def command(
    model: Model,
    output: Annotated[Path, folder_option("Folder for rows, results, curves and gallery; continued if begun.")] = Path(
        "eval-out"
    ),
    prompts: PromptSource = None,
    count: Annotated[
        int | None, typer.Option(help="How many of the prompts.", min=1, show_default="64, or all if there are fewer")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per prompt.", min=1)] = 1,
    steps: Annotated[str, typer.Option(help="Plain step counts; the first gets every method, others a few.")] = "50,28",
    methods: Annotated[
        Path | None,
        typer.Option(help="JSON list of methods instead of the standard ones.", exists=True, dir_okay=False),
    ] = None,
    adapter: Adapter = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of psnr, ssim, lpips, of videos growth, flicker, warping, smoothness, consistency, of pictures fid, "
            "clip, imagereward, adherence (demo models); or 'all'. By default psnr, ssim and those of videos, and "
            "on the demo model adherence."
        ),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    call: CallArguments = "{}",
    converged: Annotated[
        bool, typer.Option(help="Compare with the converged picture too: about two plain runs more per picture.")
    ] = True,
    shard: Annotated[str, typer.Option(help="'i/n': every n-th prompt from the i-th; they share the folder.")] = "0/1",
    plan_only: Annotated[bool, typer.Option("--plan", help="Only calibrate and write the plan, for shards.")] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, only write results.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measures speed and quality of every method against the plain pipeline, in one run on one machine.

    Quality is closeness to two pictures from the same noise: the plain pipeline's own, and the converged one, where the
    model's flow leads if it is solved to convergence. comparisons.csv says which differences could be chance.

    --report reads the saved pictures again, so fid, clip, imagereward and adherence can also be asked for afterwards.
    """
    index, number = read_shard(shard)
    step_counts = read_integers(steps, "steps")
    further = read_object(call, "call")

    with importing():
        from ..evaluate import (
            APART,
            CLIP,
            PLAN,
            Plan,
            read_methods,
            read_rows,
            run_sweep,
            standard_plan,
            with_adapter,
        )
        from ..pipeline import call_arguments, is_own, makes_videos

    hide_loading_bars()
    if report_only:
        plan = Plan.read(output)
        _write(plan, output, read_rows(output), _metrics(metrics, plan.model)[1])
        return
    paired, judges = _metrics(metrics, model)
    if (output / PLAN).is_file():
        plan = Plan.read(output)
        if plan.model != model:
            raise ConfigError(f"{output} holds an evaluation of {plan.model}: choose another --output.")
        if methods is not None:
            # what is fitted to a model is fitted to the prompts after those of the plan: only given methods take more
            more = plan.prompts
            if count is not None and count > len(more):
                more = load_prompts(prompts, count, model)
            given = read_methods(methods)
            joined = [one for one in plan.methods if "adapter" in (one.settings or {}) and one not in given]
            plan = replace(plan, methods=[*given, *joined], prompts=more)
        pipe = load(model, dtype, device)
        plan.write(output, pipe)
        if adapter is not None:
            others = [
                prompt
                for prompt in load_prompts(prompts, len(plan.prompts) + APART, model, required=1)
                if prompt not in plan.prompts
            ]
            with activity("fitting") as show:
                plan = with_adapter(plan, adapter, pipe, others[:APART] or plan.prompts[:APART], show)
            plan.write(output, pipe)
        note(
            f"continuing {output}: the plan in it is kept; --methods and --adapter add to it, with --methods a larger "
            "--count, too; other options that would change it are not looked at"
        )
    else:
        wanted = _COUNT if count is None else count
        chosen = load_prompts(prompts, wanted + APART, model, required=count or 1)
        if len(chosen) <= wanted:
            note(f"all {len(chosen)} prompts are evaluated: thresholds and schedules are fitted to the first of them")
        arguments = call_arguments(model, height, width, frames, further=further)
        pipe = load(model, dtype, device, arguments)
        videos = makes_videos(pipe)
        if metrics not in (None, "all") and not videos and (named := [name for name in paired if name in CLIP]):
            raise ConfigError(f"metrics={','.join(named)}: {model} makes pictures.")
        usable = _usable(paired, videos)
        with activity("calibrating") as show:
            plan = standard_plan(
                pipe, model, chosen[:wanted], step_counts, list(range(seeds)), arguments, usable,
                fit_baselines=is_own(model), apart=chosen[wanted:], methods_file=methods,
                adapter=None if adapter is None else Path(adapter), converged=converged, progress=show,
            )  # fmt: skip
        plan.write(output, pipe)
    if plan_only:
        print_line(f"{output / PLAN}: {len(plan.methods)} methods, {len(plan.prompts)} prompts")
        return
    rows = run_sweep(pipe, plan, output, shard=(index, number))
    expected = len(plan.methods) * len(plan.prompts) * len(plan.seeds)
    if sum("seconds" in row for row in rows) < expected:
        note("other shards are not done yet; --report writes the results once they are")
        return
    _write(plan, output, rows, judges)


def _write(plan: Any, folder: Path, rows: Sequence[Any], judges: Sequence[str]) -> None:
    from ..evaluate import (
        JUDGES,
        PLAN,
        adherence_note,
        compare_all,
        holds_videos,
        judge_pictures,
        plot_curves,
        plot_frames,
        summarise,
        table,
        write_comparisons,
        write_gallery,
        write_results,
    )

    summaries = summarise(plan, rows)
    if judges and holds_videos(plan, folder):
        note(f"left out {', '.join(judges)}: they judge pictures")
        judges = []
    loaded = {name: judge for name in judges if (judge := _load(name, JUDGES[name])) is not None}
    judge_pictures(plan, folder, summaries, loaded)
    as_json, as_csv = write_results(plan, folder, summaries)
    pairs = write_comparisons(compare_all(summaries, rows), folder)
    curves = [*plot_curves(summaries, folder), *plot_frames(summaries, folder)]
    machine = json.loads((folder / PLAN).read_text(encoding="utf-8"))["machine"]
    notes = [adherence_note(plan.prompts)] if "adherence" in loaded else []
    page = write_gallery(plan, folder, summaries, curves, machine, notes)
    for reference in sorted({summary.reference for summary in summaries}, reverse=True):
        console.print(table([s for s in summaries if s.reference == reference], f"against {reference} plain steps"))
    for text in notes:
        print_line(text)
    print_line(f"{as_json}, {as_csv}, {pairs}, {page}, " + ", ".join(path.name for path in curves))


def _metrics(text: str | None, model: str) -> tuple[list[str], list[str]]:
    """Names of the metrics that are measured as pictures are made, those of videos among them, and of the judges."""
    from ..evaluate import CLIP, JUDGES, MEASURED
    from ..pipeline import DEMO, DEMO_256

    readable = model in (DEMO, DEMO_256)
    if text is None:
        text = ",".join(["psnr", "ssim", *CLIP, *["adherence"] * readable])
    names = [*MEASURED, *JUDGES] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in MEASURED and name not in JUDGES]
    if unknown:
        raise ConfigError(f"metrics={','.join(unknown)}: take from {', '.join([*MEASURED, *JUDGES])}, or 'all'.")
    if not readable and "adherence" in names:
        note("left out adherence: its reader knows the demo model's pictures alone")
        names.remove("adherence")
    return [name for name in names if name in MEASURED], [name for name in names if name in JUDGES]


def _usable(names: Sequence[str], videos: bool) -> list[str]:
    """Those that can be loaded; of metrics that pictures do not have, none."""
    from ..evaluate import CLIP, PAIRED

    loaders = PAIRED | (CLIP if videos else {})
    return [name for name in names if name in loaders and _load(name, loaders[name]) is not None]


def _load(name: str, loader: Callable[[], Any]) -> Any:
    from ..evaluate import MetricUnavailableError

    try:
        return loader()
    except MetricUnavailableError as error:
        note(f"left out {name}: {error}")
        return None
