"""What ``ddit-rt demo`` shows: the plain pipeline beside fitted schedules, baselines, and the policy's own choice."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..errors import ConfigError
from ..schedule import FittedSchedule, one_in, plot_reports
from ..trajectories import Outcome, generate, psnr, save, ssim
from .pipeline import ADAPTER, CALL_DEFAULTS, DEMO_PROMPTS, DEMO_THRESHOLD, FITTED, FITTED_ADAPTER

SHOWN = ("plain", "detailed")

BASELINES: dict[str, dict[str, Any]] = {
    "adapter (trained)": {"coarse": "adapter", "adapter": ADAPTER},
    "delta (default without an adapter)": {"coarse": "delta"},
    "band-split": {"coarse": "band-split"},
    "naive PI-resize": {"coarse": "naive"},
    "linear extrapolation, no model call": {"coarse": "extrapolate"},
    "reuse, no model call": {"coarse": "reuse"},
}
"""Row -> settings at fixed spacing: an eighth of the steps full, then one in three, the others at 2p."""

FITTED_ROW, FITTED_ADAPTER_ROW = "fitted schedule, {}x (ddit-rt fit)", "fitted to the adapter, {}x (ddit-rt fit)"

BASELINE_SEEDS = 2
"""Seeds to average the baselines over: from one to the next their order changes."""


@dataclass
class Runner:
    """Runs the pipeline and moves the progress bar."""

    pipe: Any
    bar: tqdm
    call: dict[str, Any]
    seed: int

    def __call__(
        self, what: str, prompt: str, settings: dict[str, Any] | None, offset: int = 0, **call: Any
    ) -> Outcome:
        self.bar.set_description(f"{what:<45}")
        outcome = generate(self.pipe, settings, self.seed + offset, **{**self.call, **call, "prompt": prompt})
        self.bar.update()
        return outcome


def run_showcase(
    pipe: Any, output: Path, *, steps: int = 50, threshold: float | None = None, seed: int = 0, repeats: int = 2
) -> dict[str, Any]:
    """Runs the demo and writes pictures, plots, ``demo.json`` and ``index.html`` into ``output``.

    Args:
        pipe: The demo pipeline.
        output: Folder, made if missing.
        steps: Denoising steps, at least 8.
        threshold: τ; None takes the calibrated :data:`~ddit_rt.demo.pipeline.DEMO_THRESHOLD`.
        seed: Of the noise, the same for all runs.
        repeats: Timed runs of the plain and of the accelerated pipeline, in turns; the median counts.

    Returns:
        Everything measured, JSON-ready.

    Raises:
        ConfigError: too few steps or repeats.
    """
    if steps < 8:
        raise ConfigError(f"steps={steps}: the demo needs at least 8, so that the evolution has a history.")
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: at least one timed run.")
    threshold = DEMO_THRESHOLD if threshold is None else threshold
    output.mkdir(parents=True, exist_ok=True)
    fitted = _fitted(steps)
    runs = len(SHOWN) * (2 * repeats + BASELINE_SEEDS * (len(BASELINES) + len(fitted) + 2)) + 3
    with tqdm(total=runs, bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]") as bar:
        run = Runner(pipe, bar, {**CALL_DEFAULTS, "num_inference_steps": steps}, seed)
        generate(pipe, None, seed, **{**run.call, "num_inference_steps": 2, "prompt": "warm-up"})
        prompts = {name: _prompt(run, output, name, threshold, repeats) for name in SHOWN}
        baselines = _baselines(run, output, steps, fitted)
        sizes = _sizes(run, steps)
    reports = {entry["prompt"]: entry.pop("_report") for entry in prompts.values()}
    plot_reports(reports, output / "schedules.png")
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "device": str(pipe.device),
        "steps": steps,
        "threshold": threshold,
        "seed": seed,
        "prompts": prompts,
        "baselines": baselines,
        "sizes": sizes,
    }
    (output / "demo.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    page = Environment(loader=PackageLoader("ddit_rt.demo", "."), autoescape=True).get_template("page.html.j2")
    (output / "index.html").write_text(page.render(result=result), encoding="utf-8")
    result["page"] = str(output / "index.html")
    return result


def _prompt(run: Runner, output: Path, name: str, threshold: float, repeats: int) -> dict[str, Any]:
    """Plain and accelerated runs of one prompt, in turns."""
    prompt = DEMO_PROMPTS[name]
    plain_seconds, fast_seconds = [], []
    for _ in range(repeats):
        base = run(f"{name}: plain", prompt, None)
        fast = run(f"{name}: accelerated", prompt, {"threshold": threshold})
        plain_seconds.append(base.seconds)
        fast_seconds.append(fast.seconds)
    assert fast.report is not None
    steps = fast.report.steps
    save(base.frames, output / f"{name}-plain.png")
    save(fast.frames, output / f"{name}-accelerated.png")
    return {
        "prompt": prompt,
        "seconds_plain": plain_seconds,
        "seconds_accelerated": fast_seconds,
        "speedup_wall_clock": statistics.median(plain_seconds) / statistics.median(fast_seconds),
        "speedup_flop": fast.report.speedup_estimate,
        "psnr": psnr(fast.frames, base.frames),
        "ssim": ssim(fast.frames, base.frames),
        "full_steps": fast.report.schedule.count(1),
        "schedule": fast.report.schedule,
        "tokens": [step.tokens for step in steps],
        "patch_std": {k: [step.patch_std.get(k) for step in steps] for k in fast.report.config["multiples"]},
        "_report": fast.report,
    }


def _fitted(steps: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Row -> name of its pictures, and settings, of the shipped schedules; each holds for one step count."""
    adapter = {"coarse": "adapter", "adapter": ADAPTER}
    found = {}
    for row, paths, settings in ((FITTED_ROW, FITTED, {}), (FITTED_ADAPTER_ROW, FITTED_ADAPTER, adapter)):
        for speedup, path in paths.items():
            schedule = FittedSchedule.load(path).schedule
            if len(schedule) == steps:
                found[row.format(speedup)] = (path.stem, {**settings, "schedule": schedule})
    return found


def _baselines(
    run: Runner, output: Path, steps: int, fitted: Mapping[str, tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Fitted schedules, one with fixed spacing by every coarse path, and fewer steps, over several seeds."""
    schedule = one_in(steps, 3, 2)
    full = schedule.count(1)
    fewer = f"plain pipeline, {full} steps (as many full ones)"
    # row -> name of its pictures, and settings
    methods = dict(fitted)
    methods |= {row: (settings["coarse"], {**settings, "schedule": schedule}) for row, settings in BASELINES.items()}
    methods[fewer] = (f"{full}-steps", {"multiples": (1,)})
    rows: dict[str, dict[str, Any]] = {row: {"psnr": {}} for row in methods}
    for name in SHOWN:
        for seed in range(BASELINE_SEEDS):
            prompt = DEMO_PROMPTS[name]
            base = run(f"{name}: plain, seed {run.seed + seed}", prompt, None, seed)
            for row, values in rows.items():
                stem, settings = methods[row]
                picture = f"{name}-{stem}.png"
                call = {"num_inference_steps": full} if row == fewer else {}
                outcome = run(f"{name}: {row}", prompt, settings, seed, **call)
                assert outcome.report is not None
                values["psnr"].setdefault(name, []).append(psnr(outcome.frames, base.frames))
                values["speedup_flop"] = outcome.report.speedup_estimate * steps / len(outcome.report.steps)
                if seed == 0:
                    save(outcome.frames, output / picture)
                    values.setdefault("pictures", {})[name] = picture
    return {"schedule": schedule, "seeds": BASELINE_SEEDS, "rows": rows}


def _sizes(run: Runner, steps: int) -> list[dict[str, Any]]:
    """Every step at one size: what coarse steps cost (the paper's figure 4), and how they alone would look."""
    prompt = DEMO_PROMPTS[SHOWN[-1]]
    base = generate(run.pipe, {"multiples": (1,)}, run.seed, **{**run.call, "prompt": prompt})
    rows = [(1, base)]
    for multiple in (2, 4):
        settings = {"coarse": "band-split", "schedule": [multiple] * steps}
        rows.append((multiple, run(f"all steps at {multiple}p", prompt, settings)))
    table: list[dict[str, Any]] = []
    for multiple, outcome in rows:
        assert outcome.report is not None
        seconds = statistics.median(step.seconds for step in outcome.report.steps)
        table.append(
            {
                "multiple": multiple,
                "tokens": outcome.report.steps[0].tokens,
                "gflop_per_step": outcome.report.steps[0].flops / 1e9,
                "seconds_per_step": seconds,
                "speedup_flop": outcome.report.speedup_estimate,
                "psnr": psnr(outcome.frames, base.frames) if multiple > 1 else None,
            }
        )
    for row in table:
        row["speedup_wall_clock"] = table[0]["seconds_per_step"] / row["seconds_per_step"]
    return table


def print_summary(result: dict[str, Any], console: Console) -> None:
    """The demo's tables, for people: fitted schedules and baselines, the policy's own choice, and single sizes."""
    prompts = [entry["prompt"] for entry in result["prompts"].values()]
    baselines = result["baselines"]
    full, seeds = baselines["schedule"].count(1), baselines["seeds"]
    table = Table(
        "method",
        "FLOP",
        *prompts,
        title=f"fitted schedules, then {full} full steps at fixed spacing and the others at 2p; "
        f"{seeds} seeds: mean PSNR in dB (lowest to highest)",
    )
    for row, values in baselines["rows"].items():
        cells = (
            f"{statistics.mean(decibels):.1f} ({min(decibels):.1f} to {max(decibels):.1f})"
            for decibels in values["psnr"].values()
        )
        table.add_row(row, f"{values['speedup_flop']:.2f}x", *cells)
    console.print(table)
    table = Table(
        "prompt", "plain, s", "accelerated, s", "wall-clock", "FLOP", "PSNR, dB", "SSIM", "full steps",
        title=f"steps chosen by the policy at τ = {result['threshold']:.3g}",
    )  # fmt: skip
    for entry in result["prompts"].values():
        table.add_row(
            entry["prompt"],
            _spread(entry["seconds_plain"]),
            _spread(entry["seconds_accelerated"]),
            f"{entry['speedup_wall_clock']:.2f}x",
            f"{entry['speedup_flop']:.2f}x",
            f"{entry['psnr']:.1f}",
            f"{entry['ssim']:.3f}",
            f"{entry['full_steps']} of {result['steps']}",
        )
    console.print(table)
    for entry in result["prompts"].values():
        console.print(f"{entry['prompt']}: tokens per step " + _runs(entry["tokens"]), highlight=False)
    sizes = Table("all steps at", "tokens", "GFLOP a step", "ms a step", "wall-clock", "FLOP", "PSNR, dB")
    for size in result["sizes"]:
        sizes.add_row(
            "p" if size["multiple"] == 1 else f"{size['multiple']}p",
            str(size["tokens"]),
            f"{size['gflop_per_step']:.2f}",
            f"{size['seconds_per_step'] * 1e3:.1f}",
            f"{size['speedup_wall_clock']:.2f}x",
            f"{size['speedup_flop']:.2f}x",
            "-" if size["psnr"] is None else f"{size['psnr']:.1f}",
        )
    console.print(sizes)
    console.print(f"pictures, schedules and σ curves: {result['page']}")


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def _runs(values: list[int]) -> str:
    """Run-length text: 256 x 5, 64 x 2, ..."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return ", ".join(f"{value} x {count}" for value, count in runs)
