"""What coarse steps add to skipped steps alone, at given ratios of cost: fitted with and without them, and compared.

    python benchmarks/coarse_gain.py demo-video --output runs/gain [--prompts FILE] [--adapter FILE] [--into FILE]

For every speed-up it fits, on prompts of their own, the best schedule of full and skipped steps and the best one with
coarse steps too; both run on other prompts, the same noise for each, and are compared prompt by prompt. So does the
schedule with coarse steps once these are skipped: what they bring is told from where its full steps lie. What a coarse
step costs is not this model's ratio but --ratios: those of Wan 2.1 or FLUX.1 at their usual sizes, or given ones. It
can be stopped and started again: what is in the output folder is not done again. --into writes the result for
``benchmarks/readme.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from coarse_tables import gain_table
from fitted_runs import SHOWN, metrics_for, parser_of, prompts_of, write
from pipe_models import MODELS, build, flops

from ddit_rt.cli.options import read_numbers, read_ratios
from ddit_rt.errors import OutOfReachError
from ddit_rt.evaluate import (
    APART,
    Method,
    Plan,
    Summary,
    compare,
    read_rows,
    run_sweep,
    summarise,
)
from ddit_rt.fitting import Fitter, find_schedule
from ddit_rt.multiples import SKIP
from ddit_rt.pipeline import call_defaults, load_any

KINDS = ((1, 2, 4, SKIP), (1, 2, SKIP), (1, 4, SKIP))
"""What a search with coarse steps may use; of what they find, real runs choose."""

SKIPPED, COARSE, ADAPTER = "skipped", "coarse", "adapter"
WITHOUT = "without"
"""In names of methods: a schedule with its coarse steps skipped."""
FITS, RESULT = "fits.json", "coarse-gain.json"

Fit = dict[str, Any]
"""``speedup`` (asked), ``by``, ``schedule``, ``cost`` (in full steps, by the ratios), ``psnr`` (on its own prompts).

Without a schedule: the search takes no coarse step."""


def ratios_of(text: str) -> dict[int, float]:
    """FLOP of a step at 2p and 4p over one at p.

    Args:
        text: "wan", Wan 2.1 1.3B at 832 x 480 pixels and 81 frames; "flux", FLUX.1 at 1024 x 1024; or the ratios
            themselves, as 2:0.12,4:0.02.
    """
    if text not in MODELS:
        return read_ratios(text, "ratios")
    each = flops(*build(text, torch.device("meta"), tiny=False))
    return {k: each[k] / each[1] for k in (2, 4)}


def fit(
    pipe: Any,
    prompts: Sequence[str],
    speedups: Sequence[float],
    ratios: Mapping[int, float],
    adapter: str | None,
    call: Mapping[str, Any],
    folder: Path,
    progress: Callable[[str], None],
) -> list[Fit]:
    """Fits what is missing in ``folder``, and returns all.

    Raises:
        SystemExit: the folder holds fits of other settings.
    """
    path = folder / FITS
    asked = json.loads(json.dumps({"prompts": prompts, "ratios": ratios, "call": call, "adapter": adapter}))
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"asked": asked, "fits": []}
    # an adapter may join later
    if known["asked"] not in (asked, {**asked, "adapter": None}):
        raise SystemExit(f"{path} holds fits of other prompts, ratios, calls or adapters: choose another --output.")
    found: list[Fit] = known["fits"]

    def keep(**entry: Any) -> None:
        found.append(entry)
        path.write_text(json.dumps({"asked": asked, "fits": found}) + "\n", encoding="utf-8")

    for coarse, file in ((COARSE, None), (ADAPTER, adapter)):
        if coarse == ADAPTER and adapter is None:
            continue
        wanted = [(speedup, by) for speedup in speedups for by in (SKIPPED, coarse)]
        missing = [pair for pair in wanted if pair not in {(entry["speedup"], entry["by"]) for entry in found}]
        if not missing:
            continue
        fitter = Fitter(pipe, prompts, adapter=file, cost_ratios=ratios, progress=progress, **call)
        for speedup, by in missing:
            if by == SKIPPED:
                best = fitter.at_speedup(speedup, (1, SKIP))
            else:
                searched = [find_schedule(fitter.error_model, speedup, kinds) for kinds in KINDS]
                mixed = [schedule for schedule in searched if any(kind > 1 for kind in schedule)]
                if not mixed:
                    keep(speedup=speedup, by=by, schedule=None)
                    continue
                best = max((fitter.measured(schedule) for schedule in mixed), key=lambda one: one.psnr)
            cost = fitter.error_model.cost(best.schedule)
            keep(speedup=speedup, by=by, schedule=best.schedule, cost=cost, psnr=best.psnr)
    return found


def methods_of(fits: Sequence[Fit], steps: int, adapter: str | None) -> list[Method]:
    """The plain run and one method per fit; two if it has coarse steps."""
    methods = [Method(f"base@{steps}", "base", steps, steps)]
    for entry in fits:
        if entry["schedule"] is None:
            continue
        settings: dict[str, Any] = {"schedule": entry["schedule"], "coarse": "delta"}
        if entry["by"] == ADAPTER:
            settings |= {"coarse": "adapter", "adapter": adapter}
        methods.append(Method(name_of(entry, steps), f"fitted, {entry['by']}", steps, steps, settings))
        if entry["by"] != SKIPPED:
            bare = [kind if kind == 1 else SKIP for kind in entry["schedule"]]
            kind = f"fitted, {entry['by']}, its coarse steps skipped"
            methods.append(Method(name_of(entry, steps, WITHOUT), kind, steps, steps, {"schedule": bare}))
    return methods


def name_of(entry: Fit, steps: int, but: str = "") -> str:
    """Of the method that runs a fit, or of the one :data:`WITHOUT` its coarse steps."""
    return "-".join([entry["by"], *([but] if but else []), f"{entry['speedup']:g}x@{steps}"])


def result_of(plan: Plan, rows: Sequence[dict[str, Any]], fits: Sequence[Fit], ratios: Mapping[int, float]) -> Any:
    """What ``benchmarks/readme.py`` shows: a line per speed-up and way to make coarse steps."""
    steps = next(method.steps for method in plan.methods if method.is_reference)
    summaries = {summary.method: summary for summary in summarise(plan, rows)}
    by = {(entry["speedup"], entry["by"]): entry for entry in fits}
    lines = []
    for speedup in dict.fromkeys(entry["speedup"] for entry in fits):
        alone = by[speedup, SKIPPED]
        for coarse in (COARSE, ADAPTER):
            entry = by.get((speedup, coarse))
            if entry is None:
                continue
            if entry["schedule"] is None:
                lines.append({"speedup": speedup, "by": coarse, "skipped": _side(alone, steps, summaries)})
                continue
            found = compare(rows, name_of(entry, steps), name_of(alone, steps), "psnr")
            worth = compare(rows, name_of(entry, steps), name_of(entry, steps, WITHOUT), "psnr")
            assert found is not None and worth is not None
            bare = summaries[name_of(entry, steps, WITHOUT)]
            lines.append(
                {
                    "speedup": speedup,
                    "by": coarse,
                    "skipped": _side(alone, steps, summaries),
                    "coarse": _side(entry, steps, summaries),
                    **{name: getattr(found, name) for name in ("runs", "difference", "low", "high", "p", "better")},
                    "without": {
                        "psnr": bare.metrics["psnr"],
                        "worst": bare.worst["psnr"],
                        "difference": worth.difference,
                        "p": worth.p,
                    },
                }
            )
    shared = {"model": plan.model, "steps": steps, "prompts": len(plan.prompts), "call": plan.call}
    return {**shared, "ratios": {str(k): ratio for k, ratio in ratios.items()}, "lines": lines}


def _side(entry: Fit, steps: int, summaries: Mapping[str, Summary]) -> dict[str, Any]:
    found = summaries[name_of(entry, steps)]
    return {
        "speedup": steps / entry["cost"],
        "flops_speedup": found.flops_speedup,
        "steps": {str(kind): entry["schedule"].count(kind) for kind in (1, 2, 4, SKIP)},
        "worst": found.worst["psnr"],
        **{name: found.metrics[name] for name in SHOWN if name in found.metrics},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    models = "'demo-video', 'demo', 'demo-256', or a folder with a demo.json"
    parser = parser_of(__doc__, models, count=32, apart=APART)
    parser.add_argument("--speedups", default="2,3,5,8", help="by the ratios, with commas")
    parser.add_argument(
        "--ratios", default="wan", help="what coarse steps cost of a full one: wan, flux or 2:0.12,4:0.02"
    )
    parser.add_argument("--adapter", help="a trained adapter, to compare its coarse steps too")
    options = parser.parse_args(arguments)
    ratios = ratios_of(options.ratios)
    speedups = read_numbers(options.speedups, "speedups")
    compared, fitted = prompts_of(options)
    call = {**call_defaults(options.model), "num_inference_steps": options.steps}
    pipe = load_any(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    fits = fit(pipe, fitted, speedups, ratios, options.adapter, call, options.output, print)
    methods = methods_of(fits, options.steps, options.adapter)
    arguments_of_call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    plan = Plan(options.model, methods, compared, [0], arguments_of_call, metrics_for(pipe), converged=False)
    run_sweep(pipe, plan, options.output, pictures=False)
    result = result_of(plan, read_rows(options.output), fits, ratios)
    write(result, options, RESULT)
    print(gain_table(result))


if __name__ == "__main__":
    try:
        main()
    except OutOfReachError as error:
        raise SystemExit(str(error)) from None
