"""The figures of the README and of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evaluations import Evaluation, read_reports
from matplotlib.figure import Figure

from ddit_rt.demo import FITTED, load_pipeline
from ddit_rt.evaluate import TO_CONVERGED, Method, generate, noise_seed, plot_curves, plot_sigma
from ddit_rt.evaluate.analyses import Line, plot_lines
from ddit_rt.evaluate.settings import run_settings
from ddit_rt.schedule import COLOURS, FittedSchedule, StepView, TargetPolicy, plot_reports
from ddit_rt.trajectories import psnr

CONVERGED = TO_CONVERGED["psnr"]

CURVES = {
    "DDiT, target": ("speedup=", "o-", "#1b4965"),
    "DDiT, converged": ("speedup=, reference='converged'", "D-", "#bc4b51"),
    "UniPC, spacing 1.4": ("UniPC, spaced densely", "p--", "#7b5ea7"),
    "linear extrapolation": ("linear extrapolation, even spacing", "s--", "#f4a259"),
    "TeaCache": ("TeaCache", "^--", "#6a994e"),
    "fewer steps": ("fewer plain steps", "v--", "#888888"),
}
"""Kind of method -> label, line and colour in the README's curve."""

PICTURE = {
    "base@50": "plain, 50 steps",
    "target-2x@50": "speedup=2",
    "target-3x@50": "speedup=3",
    "converged-4x@50": "speedup=4, converged",
    "teacache-3x@50": "TeaCache, 3x",
    "16-steps@50": "16 plain steps, 3x",
}
SHEET = {
    "base@50": "plain",
    "fitted-2x@50": "fitted, 2x",
    "fitted-3x@50": "fitted, 3x",
    "ddit-1.6x@50": "DDiT by τ, 1.6x",
    "extrapolate-3@50": "extrapolate, 1 in 3",
    "delta-2p-3@50": "delta 2p, 1 in 3",
    "adapter-2p-3@50": "adapter 2p, 1 in 3",
    "teacache-2x@50": "TeaCache, 2x",
    "band-split-3@50": "band-split 2p, 1 in 3",
    "naive-3@50": "naive 2p, 1 in 3",
}
"""Method -> title of its column."""

CENTRED = {"ha": "center", "va": "center", "fontsize": 8}


def curve(evaluation: Evaluation, path: Path) -> None:
    """PSNR to both references against FLOP, of targets and their baselines, at the most steps."""
    steps = max(method.reference for method in evaluation.plan.methods)
    found = evaluation.summaries(steps)
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    panels = (("psnr", "to the plain pipeline"), (CONVERGED, "to the converged picture"))
    for axes, (metric, title) in zip(figure.subplots(1, 2), panels):
        for kind, (label, style, colour) in CURVES.items():
            points = sorted((row.flops_speedup or 0, row.metrics[metric]) for row in found if row.kind == kind)
            if points:
                axes.plot(*zip(*points), style, color=colour, label=label, linewidth=2 if "--" not in style else 1.4)
        if metric == CONVERGED:
            plain = next(row for row in found if row.kind == "base")
            axes.axhline(plain.metrics[metric], color="black", linestyle=":", label=f"plain pipeline, {steps} steps")
        axes.set_xlabel("fewer FLOP, times")
        axes.set_ylabel(f"PSNR {title}, dB")
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.suptitle(f"Demo model, {steps} steps, mean of {len(evaluation.plan.prompts)} prompts", fontsize=10)
    figure.savefig(path, dpi=100)


def all_curves(evaluation: Evaluation, folder: Path) -> None:
    """The curves that ``ddit-rt eval`` draws, all methods and metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(evaluation.summaries(), folder, "webp")


def analyses(content: Mapping[str, Any], folder: Path) -> None:
    """The figures of the paper's analyses."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in content.items():
        if isinstance(lines, list):
            plot_lines([Line(**line) for line in lines], folder / f"{name}.png", name)
    plot_sigma(read_reports(content["sigma"]), folder / "sigma.png")
    plot_reports(read_reports(content["schedules"]), folder / "schedules.png")


def gain(result: Mapping[str, Any], path: Path) -> None:
    """What coarse steps add to skipped ones over speed-up, from the result of ``coarse_gain.py``, and its interval."""
    lines = [line for line in result["lines"] if line["by"] == "coarse"]
    asked = [line["speedup"] for line in lines]
    mixed = [line for line in lines if "coarse" in line]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    quality, added = figure.subplots(1, 2, sharex=True)
    quality.plot(asked, [line["skipped"]["psnr"] for line in lines], "o-", color="black", label="skipped steps alone")
    places = [line["speedup"] for line in mixed]
    quality.plot(places, [line["coarse"]["psnr"] for line in mixed], "s--", color=COLOURS[2], label="with coarse steps")
    quality.set_ylabel("PSNR to plain, dB")
    quality.legend(fontsize=8)
    added.axhline(0, color="black", linewidth=0.8)
    for line in mixed:
        added.plot([line["speedup"]] * 2, [line["low"], line["high"]], color=COLOURS[2])
        added.plot(line["speedup"], line["difference"], "s", color=COLOURS[2], label="with where full steps lie")
        if "without" in line:
            worth = line["without"]["difference"]
            added.plot(line["speedup"], worth, "D", color=COLOURS[1], label="by coarse steps themselves")
    for line in lines:
        if "coarse" not in line:
            added.annotate("none taken", (line["speedup"], 0), fontsize=8, va="bottom", ha="center")
    added.set_ylabel("added, dB")
    handles = {text: mark for mark, text in zip(*added.get_legend_handles_labels())}
    if handles:
        added.legend(handles.values(), handles.keys(), fontsize=8)
    for axes in (quality, added):
        axes.set_xlabel("speed-up, by what steps cost there")
        axes.margins(x=0.12)
        axes.set_xticks(asked, [f"{speedup:g}x" for speedup in asked])
        axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def fitted(path: Path) -> None:
    """The shipped schedules over the sensitivity they were found with."""
    found = {speedup: FittedSchedule.load(file) for speedup, file in FITTED.items()}
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes, *strips = figure.subplots(1 + len(found), 1, sharex=True, height_ratios=(5, *[1] * len(found)))
    sensitivity = next(iter(found.values())).sensitivity
    axes.semilogy(range(len(sensitivity)), sensitivity, color="black")
    axes.set_ylabel("an error comes out\nso many times larger", fontsize=8)
    axes.grid(alpha=0.2)
    for strip, (speedup, one) in zip(strips, found.items()):
        _strip(strip, one.schedule)
        strip.set_ylabel(f"{speedup}x", rotation=0, labelpad=12, va="center", fontsize=8)
    strips[-1].set_xlabel("denoising step; blue p, yellow 2p, red 4p, grey: skipped", fontsize=8)
    figure.savefig(path, dpi=110)


def pictures(
    evaluation: Evaluation, columns: Mapping[str, str], prompts: int, progress: Callable[[str], None]
) -> dict[tuple[str, int], tuple[Any, float]]:
    """Runs methods of an evaluation on its first prompts again, from the same noise.

    Returns:
        (method, prompt index) -> pixels (H, W, 3) and PSNR to the picture of the first method, in dB.
    """
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plan = evaluation.plan
    methods = {method.name: method for method in plan.methods}
    frames: dict[tuple[str, int], Any] = {}
    for prompt in range(prompts):
        for name in columns:
            progress(f"{name}: {plan.prompts[prompt]}")
            call = {**plan.call, "prompt": plan.prompts[prompt], "num_inference_steps": methods[name].steps}
            seed = noise_seed(plan.seeds[0], prompt)
            frames[name, prompt] = generate(pipe, run_settings(methods[name]), seed, **call).frames
    base = next(iter(columns))
    return {
        (name, prompt): (one[0].movedim(0, -1).numpy(), psnr(one, frames[base, prompt]))
        for (name, prompt), one in frames.items()
    }


def side_by_side(
    evaluation: Evaluation,
    columns: Mapping[str, str],
    prompts: int,
    path: Path,
    progress: Callable[[str], None],
    gain: float | None = None,
) -> None:
    """A column per method and a row per prompt; below, the patch sizes of methods with a fixed schedule.

    Args:
        gain: Adds under every row what differs from the first column, so many times larger; None for no such rows.
    """
    found = pictures(evaluation, columns, prompts, progress)
    methods = {method.name: method for method in evaluation.plan.methods}
    each = 1 if gain is None else 2
    figure = Figure(figsize=(1.75 * len(columns), 1.9 * each * prompts + 0.35), layout="constrained")
    grid = figure.subplots(each * prompts + 1, len(columns), height_ratios=[*[10] * each * prompts, 1], squeeze=False)
    base = next(iter(columns))
    for column, (name, title) in enumerate(columns.items()):
        for row in range(prompts):
            pixels, decibels = found[name, row]
            axes = _picture(grid[each * row][column], pixels)
            axes.set_xlabel("" if name == base else f"{decibels:.0f} dB", fontsize=8)
            if row == 0:
                axes.set_title(title, fontsize=8)
            if gain is None:
                continue
            if name == base:
                below = _picture(grid[each * row + 1][column], np.zeros_like(pixels))
                below.text(0.5, 0.5, f"differences\nx {gain:g}", color="white", **CENTRED, transform=below.transAxes)
            else:
                _picture(grid[each * row + 1][column], np.clip(gain * abs(pixels - found[base, row][0]), 0, 1))
        _strip(grid[-1][column], schedule_of_settings(methods[name]))
    figure.savefig(path, dpi=110)


def schedule_of_settings(method: Method) -> list[int]:
    """The multiples of a method that has a schedule or a target; else none."""
    settings = method.settings or {}
    if "target" in settings:
        policy = TargetPolicy(**settings["target"])
        return [policy.choose(StepView(index, method.steps)) for index in range(method.steps)]
    return list(settings.get("schedule", ()))


def _picture(axes: Any, pixels: Any) -> Any:
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _strip(axes: Any, schedule: Any) -> None:
    """A schedule as a strip of coloured steps."""
    axes.bar(range(len(schedule)), [1] * len(schedule), width=1, color=[COLOURS[k] for k in schedule])
    axes.set_xlim(-0.5, max(len(schedule), 1) - 0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(bool(len(schedule)))
