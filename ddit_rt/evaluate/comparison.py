"""Two methods on the same prompts and noises: how far they differ, and whether that could be chance."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import ConfigError
from .columns import LOWER_IS_BETTER
from .metrics import TO_CONVERGED
from .summary import Summary
from .sweep import Row

REFERENCES = ("psnr", TO_CONVERGED["psnr"])
"""The metrics that methods are compared by: distance to the plain and to the converged picture."""

EQUAL_FLOP = 1.1
"""Methods whose FLOP differ by no more than this factor are compared."""


@dataclass(frozen=True)
class Comparison:
    """The first method beside the second, by one metric.

    Attributes:
        runs: Pictures that both made.
        difference: Mean of the first's value less the second's.
        low, high: 95 % interval of that mean, by Student's t.
        p: Of Wilcoxon's signed-rank test, two-sided: how often chance alone would part methods that are alike so far.
        better: Pictures on which the first is the better one.
    """

    first: str
    second: str
    metric: str
    runs: int
    difference: float
    low: float
    high: float
    p: float
    better: int


def compare(rows: Sequence[Row], first: str, second: str, metric: str) -> Comparison | None:
    """Compares two methods on the pictures that both have the metric of; None if there are fewer than two.

    Raises:
        ConfigError: a method has no rows.
    """
    values: dict[str, dict[tuple[int, int], float]] = {first: {}, second: {}}
    for row in rows:
        if row["method"] in values and metric in row:
            values[row["method"]][row["prompt"], row["seed"]] = row[metric]
    known = {row["method"] for row in rows}
    for name in (first, second):
        if name not in known:
            raise ConfigError(f"{name!r} cannot be compared: no row has it. There are {', '.join(sorted(known))}.")
    shared = sorted(values[first].keys() & values[second].keys())
    differences = [values[first][key] - values[second][key] for key in shared]
    return _comparison(first, second, metric, differences) if len(differences) > 1 else None


def _comparison(first: str, second: str, metric: str, differences: Sequence[float]) -> Comparison:
    from scipy.stats import t, wilcoxon  # half a second to import, which reading results need not pay

    mean, count = statistics.fmean(differences), len(differences)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return Comparison(
        first,
        second,
        metric,
        count,
        mean,
        mean - half,
        mean + half,
        float(wilcoxon(differences).pvalue) if any(differences) else 1.0,
        sum(sign * difference > 0 for difference in differences),
    )


def compare_all(summaries: Sequence[Summary], rows: Sequence[Row]) -> list[Comparison]:
    """Every two methods of about equal FLOP, by both references; and every method with the plain one by the converged.

    The latter says whether a method ends nearer to where the flow leads than what it was made to save.
    """
    found = []
    for first, second in _pairs(summaries):
        plain = second.kind == "base"
        for metric in REFERENCES[1:] if plain else REFERENCES:
            comparison = compare(rows, first.method, second.method, metric)
            if comparison is not None:
                found.append(comparison)
    return found


def _pairs(summaries: Sequence[Summary]) -> Iterator[tuple[Summary, Summary]]:
    for number, one in enumerate(summaries):
        for other in summaries[number + 1 :]:
            if one.reference != other.reference:
                continue
            if "base" in (one.kind, other.kind):
                yield (other, one) if one.kind == "base" else (one, other)
            elif one.flops_speedup is not None and other.flops_speedup is not None:
                slower, faster = sorted((one.flops_speedup, other.flops_speedup))
                if faster <= EQUAL_FLOP * slower:
                    yield one, other


def write_comparisons(comparisons: Sequence[Comparison], folder: Path) -> Path:
    """Writes ``comparisons.csv``; returns its path."""
    path = folder / "comparisons.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Comparison))
        for comparison in comparisons:
            values = asdict(comparison).values()
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in values)
    return path
