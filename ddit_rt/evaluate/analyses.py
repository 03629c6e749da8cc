"""The paper's analyses, for any pipeline: its tables 3 and 4, its figures 4, 6 and 10, and a sweep over ρ."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from ..errors import ConfigError
from ..fitting import calibrate
from ..schedule import COLOURS, Report, TargetPolicy, plot_reports
from ..trajectories import Outcome, limited_psnr, ssim
from .measurement import generate

Progress = Callable[[str], None]


@dataclass
class Line:
    """One setting's mean over the prompts.

    Attributes:
        label: The value that was varied.
        threshold: τ it ran with.
        seconds: Median wall clock of a call.
        speedup: Median over prompts of plain seconds over these.
        flops_speedup: Mean FLOP of full runs over FLOP spent, by the report.
        tokens: Mean image tokens per step.
        psnr, ssim: Mean, to the plain output; a picture that is the plain output itself counts as 100 dB.
    """

    label: str
    threshold: float | None
    seconds: float
    speedup: float
    flops_speedup: float
    tokens: float
    psnr: float
    ssim: float


@dataclass
class Analysis:
    """Runs settings over prompts beside the plain pipeline.

    Args:
        pipe: A supported pipeline; left plain.
        prompts: One run each per setting.
        call: Arguments of the pipeline.
        settings: Of :func:`ddit_rt.accelerate`, shared by all runs.
        seed: Of the first prompt's noise; the i-th takes seed + i.
        progress: Called with a line of text before every run.
    """

    pipe: Any
    prompts: Sequence[str]
    call: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int = 0
    progress: Progress = lambda text: None
    _plain: list[Outcome] | None = None

    def run(self, label: str, settings: Mapping[str, Any] | None) -> list[Outcome]:
        """One outcome per prompt; None for the plain pipeline."""
        outcomes = []
        for index, prompt in enumerate(self.prompts):
            self.progress(f"{label}: {prompt}")
            merged = None if settings is None else {**self.settings, **settings}
            outcomes.append(generate(self.pipe, merged, self.seed + index, **{**self.call, "prompt": prompt}))
        return outcomes

    @property
    def plain(self) -> list[Outcome]:
        if self._plain is None:
            generate(self.pipe, None, self.seed, **{**self.call, "prompt": self.prompts[0], "num_inference_steps": 2})
            self._plain = self.run("plain", None)
        return self._plain

    def line(self, label: str, settings: Mapping[str, Any]) -> Line:
        """Runs one setting and compares it with the plain pipeline."""
        plain, outcomes = self.plain, self.run(label, settings)
        reports = [_report(outcome) for outcome in outcomes]
        steps = [step for report in reports for step in report.steps]
        pairs = list(zip(outcomes, plain))
        return Line(
            label=label,
            threshold={**self.settings, **settings}.get("threshold"),
            seconds=statistics.median(outcome.seconds for outcome in outcomes),
            speedup=statistics.median(base.seconds / fast.seconds for fast, base in pairs),
            flops_speedup=statistics.fmean(report.speedup_estimate for report in reports),
            tokens=statistics.fmean(step.tokens for step in steps),
            psnr=statistics.fmean(limited_psnr(fast.frames, base.frames) for fast, base in pairs),
            ssim=statistics.fmean(ssim(fast.frames, base.frames) for fast, base in pairs),
        )

    def order(self, speedup: float) -> list[Line]:
        """Table 3: the order of the finite difference, each at the τ that spends the same FLOP.

        σ shrinks with the order, so one τ for all would compare speeds, not orders.
        """
        lines = []
        for order in (1, 2, 3):
            given = {**self.settings, "order": order}
            shared = {name: value for name, value in given.items() if name != "threshold"}
            found = calibrate(
                self.pipe, self.prompts[:2], speedup, shared, 5, self.seed, self.progress, **self._without_prompt()
            )
            lines.append(self.line(f"n = {order}", {"order": order, "threshold": found.threshold}))
        return lines

    def tau(self, thresholds: Sequence[float]) -> list[Line]:
        """Table 4: τ."""
        return [self.line(f"τ = {tau:.3g}", {"threshold": tau}) for tau in thresholds]

    def rho(self, quantiles: Sequence[float]) -> list[Line]:
        """The share of patches that have to be smooth, at one τ."""
        return [self.line(f"ρ = {quantile:g}", {"quantile": quantile}) for quantile in quantiles]

    def patch_size(self, multiples: Sequence[int] = (1, 2, 4)) -> list[Line]:
        """Figure 4: every step at one size. Quality is what that costs without any full step."""
        steps = len(_report(self.run("steps", {"threshold": 0.0})[0]).steps)
        settings = {"coarse": "band-split", "positions": "native"}
        return [self.line(f"{k if k > 1 else ''}p", {**settings, "schedule": [k] * steps}) for k in multiples]

    def misses(self, speedups: Sequence[float]) -> list[Misses]:
        """Whether what forecasts missed foretells the error of a run, at several targets."""
        plain = self.plain
        return [
            Misses.of(speedup, plain, self.run(f"{speedup:g}x", {"schedule": TargetPolicy(speedup)}))
            for speedup in speedups
        ]

    def reports(self, settings: Mapping[str, Any]) -> dict[str, Report]:
        """Prompt -> report of a run, for figures 6 (``threshold=0`` records σ alone) and 10."""
        return dict(zip(self.prompts, map(_report, self.run("schedule", settings))))

    def _without_prompt(self) -> dict[str, Any]:
        return {name: value for name, value in self.call.items() if name != "prompt"}


@dataclass
class Misses:
    """Whether what forecasts missed says how far from the plain output a run ends, over prompts.

    Attributes:
        speedup: Of the target that ran.
        runs: Prompts.
        psnr, psnr_low, psnr_high: To the plain output: mean, least and largest.
        spread: Largest over least of the runs' misses, each the root of the sum of squares of a step in σ times what
            the forecast at its end missed.
        correlation: Spearman's, of that miss and the PSNR; -1 if the larger miss always ends farther off.
        p: Chance of a correlation so far from 0, or farther, where there is none.
    """

    speedup: float
    runs: int
    psnr: float
    psnr_low: float
    psnr_high: float
    spread: float
    correlation: float
    p: float

    @staticmethod
    def of(speedup: float, plain: Sequence[Outcome], outcomes: Sequence[Outcome]) -> Misses:
        """From runs of a target, and the plain runs beside them."""
        decibels = [limited_psnr(fast.frames, base.frames) for fast, base in zip(outcomes, plain)]
        missed = [_missed(_report(outcome)) for outcome in outcomes]
        found = spearmanr(missed, decibels)
        low, high = min(decibels), max(decibels)
        return Misses(
            speedup, len(outcomes), statistics.fmean(decibels), low, high, max(missed) / max(min(missed), 1e-12),
            float(found.statistic), float(found.pvalue),
        )  # fmt: skip


def _missed(report: Report) -> float:
    """The root of the sum of squares over a run's gaps of their length in σ times what was missed at their end."""
    total, begin = 0.0, report.steps[0].sigma
    for step in report.steps:
        if step.missed is not None:
            total += ((begin - step.sigma) * step.missed) ** 2
        if step.multiple == 1:
            begin = step.sigma
    return math.sqrt(total)


def plot_sigma(reports: Mapping[str, Report], path: Path) -> Path:
    """Figure 6: σ of every size over the steps, for several prompts in one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for style, (prompt, report) in zip("-:", list(reports.items())[:2]):
        sizes = sorted({k for step in report.steps for k in step.patch_std})
        for k in sizes:
            points = [(step.index, step.patch_std[k]) for step in report.steps if step.patch_std.get(k, 0) > 0]
            axis.semilogy(*zip(*points), style, color=COLOURS[k], label=f"{prompt}, {k if k > 1 else ''}p")
    axis.set_xlabel("denoising step")
    axis.set_ylabel("ρ-quantile of patch std")
    axis.grid(alpha=0.2)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return path


def plot_lines(lines: Sequence[Line], path: Path, title: str) -> Path:
    """PSNR against speed-up wall-clock, one labelled point per setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([line.speedup for line in lines], [line.psnr for line in lines], "o-")
    for line in lines:
        axis.annotate(line.label, (line.speedup, line.psnr), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set_xlabel("speed-up wall-clock")
    axis.set_ylabel("PSNR to the plain output, dB")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return path


def write_lines(lines: Sequence[Line], folder: Path, name: str) -> list[Path]:
    """Writes ``NAME.json``, ``NAME.csv`` and ``NAME.png``; returns them."""
    if not lines:
        raise ConfigError(f"{name}: there is nothing to write.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(line) for line in lines]
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "csv", "png")]
    paths[0].write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    with paths[1].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot_lines(lines, paths[2], name)
    return paths


def write_misses(found: Sequence[Misses], folder: Path) -> Path:
    """Writes ``misses.json``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "misses.json"
    path.write_text(json.dumps([asdict(line) for line in found], indent=1), encoding="utf-8")
    return path


def write_schedules(reports: Mapping[str, Report], folder: Path, name: str) -> list[Path]:
    """Writes the reports as ``NAME.json`` and their schedules as ``NAME.png``; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {prompt: json.loads(report.to_json()) for prompt, report in reports.items()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return [path, plot_reports(reports, folder / f"{name}.png")]


def _report(outcome: Outcome) -> Report:
    assert outcome.report is not None
    return outcome.report
