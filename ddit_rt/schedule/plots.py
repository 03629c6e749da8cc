"""Figures of a run: the patch schedule and the σ curves it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..multiples import label, volume


class Reported(Protocol):
    """What is drawn of a :class:`~ddit_rt.schedule.Report`."""

    @property
    def steps(self) -> Sequence[Any]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def schedule(self) -> Sequence[int]: ...


COLOURS = {0: "#d9d9d9", 1: "#1b4965", 2: "#f4a259", 4: "#bc4b51", 21: "#5b8e7d", 22: "#8cb369"}


def plot_report(report: Reported, path: Path, title: str | None = None) -> Path:
    """Draws one report (see :func:`plot_reports`)."""
    return plot_reports({title or "": report}, path)


def plot_reports(reports: Mapping[str, Reported], path: Path) -> Path:
    """Draws, per report, the schedule as a strip of coloured steps over its σ curves on a log scale.

    Args:
        reports: Title -> report.
        path: Image file; its suffix gives the format.
    """
    from matplotlib.figure import Figure  # Figure alone: no pyplot state, no display needed
    from matplotlib.patches import Patch

    figure = Figure(figsize=(5.2 * len(reports), 4.2), layout="constrained")
    axes = figure.subplots(2, len(reports), squeeze=False, sharex="col", height_ratios=(1, 4))
    for column, (title, report) in enumerate(reports.items()):
        strip, curves = axes[0][column], axes[1][column]
        for step in report.steps:
            strip.bar(step.index, 1, width=1.0, color=COLOURS[step.multiple], edgecolor="white", linewidth=0.5)
        strip.set_yticks([])
        strip.set_title(title, fontsize=10)
        for k in report.config.get("multiples", ()):
            points = [(s.index, s.patch_std[k]) for s in report.steps if s.patch_std.get(k, 0) > 0]
            if points:
                curves.semilogy(*zip(*points), color=COLOURS[k], marker=".", label=f"σ at {label(k)}")
        if report.config.get("threshold"):
            curves.axhline(report.config["threshold"], color="grey", linestyle="--", linewidth=1, label="τ")
        curves.set_xlabel("denoising step")
        if curves.lines:
            curves.legend(fontsize=8)
        curves.grid(alpha=0.2)
    axes[1][0].set_ylabel("ρ-quantile of patch std")
    every = {k for report in reports.values() for k in (*report.config.get("multiples", ()), *report.schedule)}
    used = sorted(every, key=volume)
    handles = [Patch(color=COLOURS[k], label=label(k)) for k in used]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(used), fontsize=8, title="patch size")
    figure.savefig(path, dpi=130)
    return path
