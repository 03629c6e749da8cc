"""From the rows of a sweep to one line per method: speed and quality side by side."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from .columns import COMPARED, FRAMES, LOWER_IS_BETTER, METRIC_NAMES, TO_PLAIN
from .methods import Method
from .metrics import TO_CONVERGED, Judge
from .sweep import PLAN, Plan, Row, pictures_of


@dataclass
class Summary:
    """What one method gave over all prompts and seeds.

    Attributes:
        runs: Pictures or videos it was measured on.
        seconds: Median wall clock of a call, with text encoder and VAE.
        seconds_low, seconds_high: Its quartiles.
        speedup: Median, over the runs, of the reference's seconds over this method's seconds for the same picture.
        flops: The transformer's floating-point operations on the first prompt, as executed.
        flops_speedup: The reference's over these.
        tokens: Image tokens over all model steps of a call, mean; None for plain runs.
        cached: Steps without a model call, mean; None for plain runs.
        peak_bytes: Largest CUDA allocation; None on CPUs.
        metrics: Metric -> mean over the runs that have it (the set's value for FID and the like).
        spread: Metric -> standard deviation over those runs.
        worst: Metric -> mean over the worst tenth of the runs, of metrics to the plain and the converged picture.
        frames: Of videos, the PSNR of every frame to the plain clip's in dB, mean over the runs; empty for pictures.
    """

    method: str
    kind: str
    steps: int
    reference: int
    runs: int
    seconds: float
    seconds_low: float
    seconds_high: float
    speedup: float
    flops: float | None
    flops_speedup: float | None
    tokens: float | None
    cached: float | None
    peak_bytes: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    frames: list[float] = field(default_factory=list)


def summarise(plan: Plan, rows: Sequence[Row]) -> list[Summary]:
    """One :class:`Summary` per method that has rows, in the plan's order."""
    flops = {row["method"]: row["flops"] for row in rows if "flops" in row}
    runs: dict[str, dict[tuple[int, int], Row]] = {}
    for row in rows:
        if "seconds" in row:
            runs.setdefault(row["method"], {})[row["prompt"], row["seed"]] = row
    base = {method.steps: method.name for method in plan.methods if method.is_reference}
    return [
        _summary(method, runs[method.name], flops, base[method.reference])
        for method in plan.methods
        if method.name in runs
    ]


def _summary(
    method: Method,
    runs: Mapping[tuple[int, int], Row],
    flops: Mapping[str, float],
    base: str,
) -> Summary:
    seconds = [row["seconds"] for row in runs.values()]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    ratios = [row["reference_seconds"] / row["seconds"] for row in runs.values()]
    own = flops.get(method.name)
    first = next(iter(runs.values()))
    # the plain picture is no distance from itself
    names = [name for name in COMPARED if name in first and not (method.is_reference and name in TO_PLAIN)]
    frames = [] if method.is_reference else [row[FRAMES] for row in runs.values() if FRAMES in row]
    values = {name: [row[name] for row in runs.values()] for name in names}

    def mean(name: str) -> float | None:
        given = [row[name] for row in runs.values() if name in row]
        return statistics.fmean(given) if given else None

    peaks = [row["peak_bytes"] for row in runs.values() if "peak_bytes" in row]
    return Summary(
        method=method.name,
        kind=method.kind,
        steps=method.steps,
        reference=method.reference,
        runs=len(runs),
        seconds=middle,
        seconds_low=low,
        seconds_high=high,
        speedup=statistics.median(ratios),
        flops=own,
        flops_speedup=flops[base] / own if own and base in flops else None,
        tokens=mean("tokens"),
        cached=mean("cached"),
        peak_bytes=max(peaks, default=None),
        metrics={name: statistics.fmean(numbers) for name, numbers in values.items()},
        spread={name: statistics.pstdev(numbers) for name, numbers in values.items()},
        worst={name: worst_tenth(numbers, name in LOWER_IS_BETTER) for name, numbers in values.items()},
        frames=[statistics.fmean(column) for column in zip(*frames)],
    )


def worst_tenth(values: Sequence[float], lower_is_better: bool = False) -> float:
    """Mean of the worst tenth of ``values``, rounded up to whole ones: 7 of 64, 1 of 5."""
    count = math.ceil(len(values) / 10)
    return statistics.fmean(sorted(values, reverse=lower_is_better)[:count])


def judge_pictures(plan: Plan, folder: Path, summaries: Sequence[Summary], judges: Mapping[str, Judge]) -> None:
    """Adds what judges say of the saved pictures of a sweep, the references' own among them, in place."""
    methods = {method.name: method for method in plan.methods}
    base = {method.steps: method for method in plan.methods if method.is_reference}
    for summary in summaries:
        pictures = {(p, s): path for p, s, path in pictures_of(folder, plan, methods[summary.method])}
        plain = {(p, s): path for p, s, path in pictures_of(folder, plan, base[summary.reference])}
        keys = sorted(pictures.keys() & plain.keys())
        prompts = [plan.prompts[prompt] for prompt, _ in keys]
        for name, judge in judges.items():
            values = judge([pictures[key] for key in keys], [plain[key] for key in keys], prompts) if keys else []
            if values:
                summary.metrics[name] = statistics.fmean(values)
            if len(values) > 1:
                summary.spread[name] = statistics.pstdev(values)


def write_results(plan: Plan, folder: Path, summaries: Sequence[Summary]) -> tuple[Path, Path]:
    """Writes ``results.json`` (with plan, machine and versions) and ``results.csv``; returns both paths."""
    machine = json.loads((folder / PLAN).read_text(encoding="utf-8"))["machine"]
    content = {"machine": machine, "plan": plan.to_dict(), "results": [asdict(summary) for summary in summaries]}
    as_json, as_csv = folder / "results.json", folder / "results.csv"
    as_json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    metrics = sorted({name for summary in summaries for name in summary.metrics})
    worst = sorted({name for summary in summaries for name in summary.worst})
    with as_csv.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        plain = [name for name in Summary.__dataclass_fields__ if name not in _NO_COLUMN]
        writer.writerow(
            [*plain, *metrics, *(f"{name}_std" for name in metrics), *(f"{name}_worst_tenth" for name in worst)]
        )
        for summary in summaries:
            values = asdict(summary)
            numbers = [summary.metrics.get(name) for name in metrics] + [summary.spread.get(name) for name in metrics]
            numbers += [summary.worst.get(name) for name in worst]
            writer.writerow([_cell(value) for value in (*(values[name] for name in plain), *numbers)])
    return as_json, as_csv


def table(summaries: Sequence[Summary], title: str = "") -> Table:
    """The results as a table for the terminal; -: not measured, as the plain run's distance from itself."""
    metrics = [name for name in METRIC_NAMES if any(name in summary.metrics for summary in summaries)]
    worst = [name for name in ("psnr", TO_CONVERGED["psnr"]) if any(name in summary.worst for summary in summaries)]
    # short words, which a terminal can break a heading at
    short = {name: name.replace("_converged", " conv.") for name in METRIC_NAMES}
    heads = [*(short[name] for name in metrics), *(f"{short[name]} worst 10%" for name in worst)]
    result = Table("method", "s", "speed-up", "FLOP ÷", *heads, title=title)
    result.columns[0].no_wrap = True
    for summary in summaries:
        result.add_row(
            summary.method,
            f"{summary.seconds:.3f}",
            f"{summary.speedup:.2f}",
            "" if summary.flops_speedup is None else f"{summary.flops_speedup:.2f}",
            *(f"{summary.metrics[name]:.3f}" if name in summary.metrics else "-" for name in metrics),
            *(f"{summary.worst[name]:.2f}" if name in summary.worst else "-" for name in worst),
        )
    return result


_NO_COLUMN = ("metrics", "spread", "worst", "frames")


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
