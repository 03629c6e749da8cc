"""Speed-quality curves: one figure per metric, against the clock and against FLOP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..schedule import PSNR_LIMIT
from .columns import METRIC_NAMES
from .metrics import TO_CONVERGED
from .summary import Summary

_MARKERS = "osD^v<>Pp*Xh8d"
_OURS = ("DDiT", "delta", "mixed", "adapter")


def plot_curves(summaries: Sequence[Summary], folder: Path, suffix: str = "png") -> list[Path]:
    """Draws ``curve-METRIC-STEPS.png`` for every metric and reference step count; returns the files.

    One line per kind of method, its points joined in order of speed; DDiT's own forms are drawn bold.
    """
    from matplotlib.figure import Figure  # Figure alone: no pyplot state, no display needed

    written = []
    for reference in sorted({summary.reference for summary in summaries}):
        shown = [summary for summary in summaries if summary.reference == reference]
        for metric in (name for name in METRIC_NAMES if any(name in summary.metrics for summary in shown)):
            figure = Figure(figsize=(12, 5.2), layout="constrained")
            clock, arithmetic = figure.subplots(1, 2, sharey=True)
            for axis, speed in ((clock, "speedup"), (arithmetic, "flops_speedup")):
                _draw(axis, shown, metric, speed)
            clock.set_xlabel("speed-up wall-clock, whole call")
            arithmetic.set_xlabel("FLOP of the plain transformer over FLOP spent")
            clock.set_ylabel(METRIC_NAMES[metric])
            handles, labels = clock.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right center", fontsize=8)
            runs = max(summary.runs for summary in shown)
            figure.suptitle(f"{METRIC_NAMES[metric]} against speed, {reference} steps, {runs} pictures", fontsize=11)
            path = folder / f"curve-{metric}-{reference}.{suffix}"
            figure.savefig(path, dpi=130)
            written.append(path)
    return written


FRAMES_AT = (2.0, 3.0, 5.0)
"""Ratios of FLOP at which methods are shown frame by frame."""

_NEAR = 1.15  # a method stands for a ratio that it is no farther from than this factor


def plot_frames(
    summaries: Sequence[Summary], folder: Path, suffix: str = "png", spread: Sequence[float] = ()
) -> list[Path]:
    """Draws ``frames-STEPS.png`` for videos: PSNR to the plain clip over its frames; returns the files.

    One line per kind of method, of its method that is nearest to each of :data:`FRAMES_AT`, if one is near.

    Args:
        spread: PSNR of the plain model's clips of one prompt to each other, frame by frame, to show beside.
    """
    from matplotlib.figure import Figure

    written = []
    for reference in sorted({summary.reference for summary in summaries}):
        shown = [s for s in summaries if s.reference == reference and s.frames and s.flops_speedup]
        if not shown:
            continue
        figure = Figure(figsize=(4.6 * len(FRAMES_AT), 4.6), layout="constrained")
        labels: dict[str, Any] = {}
        for axis, speedup in zip(figure.subplots(1, len(FRAMES_AT), sharey=True), FRAMES_AT):
            for number, kind in enumerate(dict.fromkeys(summary.kind for summary in shown)):
                nearest = min((s for s in shown if s.kind == kind), key=lambda s: _apart(s, speedup))
                # a clip that is the plain one would squeeze all others together
                if _apart(nearest, speedup) > _NEAR or min(nearest.frames) >= PSNR_LIMIT:
                    continue
                style = "-" if kind.startswith(_OURS) else "--"
                marker = _MARKERS[number % len(_MARKERS)]
                (labels[kind],) = axis.plot(nearest.frames, style, marker=marker, markersize=4, color=f"C{number % 10}")
            if spread:
                (labels["plain, other seeds"],) = axis.plot(spread, ":", color="black")
            axis.set_title(f"about {speedup:g}x fewer FLOP", fontsize=10)
            axis.set_xlabel("frame")
            axis.grid(alpha=0.25)
        figure.axes[0].set_ylabel("PSNR to the plain clip's frame, dB")
        figure.legend(list(labels.values()), list(labels), loc="outside right center", fontsize=8)
        figure.suptitle(f"Error along the clip, {reference} steps, {max(s.runs for s in shown)} clips", fontsize=11)
        path = folder / f"frames-{reference}.{suffix}"
        figure.savefig(path, dpi=130)
        written.append(path)
    return written


def _apart(summary: Summary, speedup: float) -> float:
    """The factor between a method's ratio of FLOP and another, at least 1."""
    own = summary.flops_speedup or 1.0
    return max(own / speedup, speedup / own)


def _draw(axis, summaries: Sequence[Summary], metric: str, speed: str) -> None:  # type: ignore[no-untyped-def]
    kinds = list(dict.fromkeys(summary.kind for summary in summaries))
    for number, kind in enumerate(kinds):
        points = sorted(
            (getattr(summary, speed), summary.metrics[metric])
            for summary in summaries
            if summary.kind == kind and metric in summary.metrics and getattr(summary, speed) is not None
        )
        if not points:
            continue
        ours = kind.startswith(_OURS)
        axis.plot(
            *zip(*points),
            label=kind,
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=2.2 if ours else 1.2,
            linestyle="-" if ours else "--",
            color=f"C{number % 10}",
            alpha=1.0 if number < 10 else 0.55,
        )
    plain = [s.metrics[metric] for s in summaries if s.kind == "base" and metric in s.metrics]
    if metric in TO_CONVERGED.values() and plain:
        # above the line a method is a better solver than the plain pipeline, not only a cheaper one
        axis.axhline(plain[0], color="black", linewidth=0.8, linestyle=":")
    # a method that never left the plain trajectory would squeeze all others together
    values = [s.metrics[metric] for s in summaries if metric in s.metrics and s.metrics[metric] < PSNR_LIMIT]
    if metric in ("psnr", TO_CONVERGED["psnr"]) and values:
        axis.set_ylim(min(values) - 1.5, max(values) + 1.5)
    axis.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 4, 6, 8]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
