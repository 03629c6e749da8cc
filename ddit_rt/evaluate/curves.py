"""Speed-quality curves: one figure per metric, against the clock and against FLOP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .metrics import TO_CONVERGED
from .summary import METRIC_NAMES, Summary
from .sweep import PSNR_LIMIT

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
