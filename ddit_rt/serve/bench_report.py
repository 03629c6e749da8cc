"""What a load test found: per level and speed-up in numbers, as JSON and as a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from .bench import Block, Load

RESULTS, PLOT = "load.json", "latency-throughput.png"


@dataclass(frozen=True)
class Percentiles:
    """Of one quantity over all pictures, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Spread:
    """Of one quantity over the rounds."""

    middle: float
    least: float
    most: float


@dataclass(frozen=True)
class Summary:
    """One level of load at one speed-up. None where no picture says anything of it."""

    level: float
    speedup: float
    sent: int
    completed: int
    failed: dict[str, int]
    """Requests without a picture, by reason."""
    lost: int
    """Of those, the ones without an error object."""
    throughput: Spread
    """Pictures per second; in the middle all pictures over all time."""
    against_plain: Spread | None
    """Throughput over the plain one of the same round; the median in the middle."""
    latency: Percentiles | None
    first_partial: Percentiles | None
    queued: Percentiles | None
    denoising: Percentiles | None
    batch: float | None
    """Mean size of the batch that a picture was made in."""
    achieved: float | None
    """Mean speed-up that the server says it reached, in FLOP."""
    behind: float
    """Seconds by which the latest request was sent after it was due."""


def summarize(blocks: Sequence[Block]) -> list[Summary]:
    """One summary per level and speed-up, in the order of levels, then speed-ups."""
    plain = {(block.level, block.round): _rate(block) for block in blocks if block.speedup == 1}
    found = []
    for level, speedup in sorted({(block.level, block.speedup) for block in blocks}):
        own = [block for block in blocks if (block.level, block.speedup) == (level, speedup)]
        outcomes = [outcome for block in own for outcome in block.outcomes]
        pictures = [outcome for outcome in outcomes if outcome.code is None]
        rates = [_rate(block) for block in own]
        ratios = [_rate(block) / plain[level, block.round] for block in own if plain.get((level, block.round))]
        seconds = [outcome.ddit.get("seconds") or {} for outcome in pictures]
        found.append(
            Summary(
                level=level,
                speedup=speedup,
                sent=len(outcomes),
                completed=len(pictures),
                failed=dict(Counter(outcome.code for outcome in outcomes if outcome.code is not None).most_common()),
                lost=sum(not outcome.answered for outcome in outcomes),
                throughput=Spread(len(pictures) / sum(block.seconds for block in own), min(rates), max(rates)),
                against_plain=Spread(median(ratios), min(ratios), max(ratios)) if ratios and speedup != 1 else None,
                latency=_percentiles(outcome.latency for outcome in pictures),
                first_partial=_percentiles(outcome.first_partial for outcome in pictures),
                queued=_percentiles(one.get("queued") for one in seconds),
                denoising=_percentiles(one.get("denoising") for one in seconds),
                batch=_mean(outcome.ddit.get("batch") for outcome in pictures),
                achieved=_mean(outcome.ddit.get("speedup") for outcome in pictures),
                behind=max(block.behind for block in own),
            )
        )
    return found


def write_load(url: str, load: Load, summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Writes ``load.json`` and the plot of latency against throughput; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    results, plot = folder / RESULTS, folder / PLOT
    value = {"url": url, "load": load.model_dump(mode="json"), "settings": [asdict(summary) for summary in summaries]}
    results.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _plot(load, summaries, plot)
    return [results, plot]


def _plot(load: Load, summaries: Sequence[Summary], path: Path) -> None:
    from matplotlib.figure import Figure  # Figure alone: no pyplot state, no display needed

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    for number, speedup in enumerate(load.speedups):
        shown = [one for one in summaries if one.speedup == speedup and one.latency is not None]
        for name, style in (("p50", "-"), ("p99", "--")):
            axis.plot(
                [one.throughput.middle for one in shown],
                [getattr(one.latency, name) for one in shown],
                style,
                marker="o",
                color=f"C{number}",
                label=f"{'plain' if speedup == 1 else f'{speedup:g}x'}, {name}",
            )
        for one in shown:
            assert one.latency is not None
            place = (one.throughput.middle, one.latency.p50)
            axis.annotate(f"{one.level:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("pictures per second")
    axis.set_ylabel("latency, seconds")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    what = "clients at once" if load.mode == "closed" else "requests per second"
    figure.suptitle(f"{load.model}: latency against throughput; at the points, {what}", fontsize=11)
    figure.savefig(path, dpi=130)


def _rate(block: Block) -> float:
    return sum(outcome.code is None for outcome in block.outcomes) / block.seconds


def _percentiles(values: Iterable[float | None]) -> Percentiles | None:
    import numpy as np

    known = [value for value in values if value is not None]
    return Percentiles(*map(float, np.percentile(known, (50, 90, 99)))) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
