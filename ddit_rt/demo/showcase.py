"""What ``ddit-rt demo`` shows: targets beside the plain pipeline, then what single coarse paths and sizes are worth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..schedule import one_in, plot_reports
from ..trajectories import psnr, save, ssim
from .pipeline import ADAPTER, CALL_DEFAULTS, DEMO_PROMPTS, DEMO_THRESHOLD
from .running import Runner, check_numbers, started, timed, write_page

SHOWN = ("plain", "detailed")

TARGETS: dict[str, dict[str, Any]] = {
    "speedup=3": {"speedup": 3.0},
    "speedup=3, toward_converged=0.3": {"speedup": 3.0, "toward_converged": 0.3},
    "speedup=4, toward_converged=1": {"speedup": 4.0, "toward_converged": 1.0},
}
"""Row -> arguments of ``accelerate``; the rows of the first table after the plain pipeline's."""

BASELINES: dict[str, dict[str, Any]] = {
    "adapter (trained)": {"coarse": "adapter", "adapter": ADAPTER},
    "delta (coarse steps without training)": {"coarse": "delta"},
    "band-split": {"coarse": "band-split"},
    "naive PI-resize": {"coarse": "naive"},
    "linear extrapolation, no model call": {"coarse": "extrapolate", "corrector": False},
    "reuse, no model call": {"coarse": "reuse", "corrector": False},
}
"""Row -> settings at fixed spacing: an eighth of the steps full, then one in three, the others at 2p."""


def run_showcase(
    pipe: Any, output: Path, *, steps: int = 50, threshold: float | None = None, seed: int = 0, repeats: int = 2
) -> dict[str, Any]:
    """Runs the demo and writes pictures, plots, ``demo.json`` and ``index.html`` into ``output``.

    Args:
        pipe: The demo pipeline.
        output: Folder, made if missing.
        steps: Denoising steps, at least 8.
        threshold: τ of the threshold rule's row; None takes :data:`~ddit_rt.demo.pipeline.DEMO_THRESHOLD`.
        seed: Of the noise, the same for all runs.
        repeats: Timed runs of the plain pipeline and of every target, in turns; the median counts.

    Returns:
        Everything measured, JSON-ready.

    Raises:
        ConfigError: too few steps or repeats.
    """
    check_numbers(steps, repeats, 8, "so that the evolution has a history")
    threshold = DEMO_THRESHOLD if threshold is None else threshold
    output.mkdir(parents=True, exist_ok=True)
    runs = len(SHOWN) * (repeats * (1 + len(TARGETS)) + 1 + len(BASELINES) + 2) + 3
    with started(pipe, runs, {**CALL_DEFAULTS, "num_inference_steps": steps}, seed) as run:
        prompts = {name: _targets(run, output, name, repeats) for name in SHOWN}
        plain = {name: entry.pop("_plain") for name, entry in prompts.items()}
        baselines = _baselines(run, output, steps, threshold, plain)
        sizes = _sizes(run, steps)
    reports = {f"{e['prompt']}, {row}": r for e in prompts.values() for row, r in e.pop("_reports").items()}
    plot_reports(reports, output / "schedules.png")
    measured = {"threshold": threshold, "prompts": prompts, "baselines": baselines, "sizes": sizes}
    return write_page(pipe, output, "page.html.j2", steps, seed, **measured)


def _targets(run: Runner, output: Path, name: str, repeats: int) -> dict[str, Any]:
    """One prompt by the plain pipeline and by every target, in turns, against both references."""
    prompt = DEMO_PROMPTS[name]
    converged = run.converged(f"{name}: converged", prompt).frames
    outcomes = run.in_turns(name, prompt, TARGETS, repeats)
    plain = outcomes["plain"][0].frames
    save(converged, output / f"{name}-converged.png")
    rows: dict[str, dict[str, Any]] = {}
    for index, (row, made) in enumerate(outcomes.items()):
        accelerated = made[0].report is not None
        rows[row] = {
            **timed(made, outcomes["plain"]),
            "picture": save(made[0].frames, output / f"{name}-{index}.png").name,
            "psnr": psnr(made[0].frames, plain) if accelerated else None,
            "ssim": ssim(made[0].frames, plain) if accelerated else None,
            "psnr_converged": psnr(made[0].frames, converged),
        }
    reports = {row: made[0].report for row, made in outcomes.items() if made[0].report is not None}
    return {"prompt": prompt, "rows": rows, "_plain": plain, "_reports": reports}


def _baselines(
    run: Runner, output: Path, steps: int, threshold: float, plain: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """One schedule of fixed spacing by every coarse path, fewer steps, and the paper's threshold rule."""
    schedule = one_in(steps, 3, 2)
    full = schedule.count(1)
    fewer = f"plain pipeline, {full} steps (as many full ones)"
    # row -> name of its pictures, and settings
    methods = {row: (settings["coarse"], {**settings, "schedule": schedule}) for row, settings in BASELINES.items()}
    methods[fewer] = (f"{full}-steps", {"multiples": (1,)})
    methods[f"the paper's threshold rule, τ = {threshold:.3g}"] = ("threshold", {"threshold": threshold})
    rows: dict[str, dict[str, Any]] = {row: {"psnr": {}, "pictures": {}} for row in methods}
    for name in SHOWN:
        for row, values in rows.items():
            stem, settings = methods[row]
            picture = f"{name}-{stem}.png"
            call = {"num_inference_steps": full} if row == fewer else {}
            outcome = run(f"{name}: {row}", DEMO_PROMPTS[name], settings, **call)
            assert outcome.report is not None
            values["psnr"][name] = psnr(outcome.frames, plain[name])
            values["speedup_flop"] = outcome.report.speedup_estimate * steps / len(outcome.report.steps)
            save(outcome.frames, output / picture)
            values["pictures"][name] = picture
    return {"schedule": schedule, "rows": rows}


def _sizes(run: Runner, steps: int) -> list[dict[str, Any]]:
    """Every step at one size: what coarse steps cost (the paper's figure 4), and how they alone would look."""
    prompt = DEMO_PROMPTS[SHOWN[-1]]
    base = run("all steps at p", prompt, {"multiples": (1,)})
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
    """The demo's tables, for people: targets, then baselines at fixed spacing, and single sizes."""
    for entry in result["prompts"].values():
        console.print(_target_table(entry))
    prompts = [entry["prompt"] for entry in result["prompts"].values()]
    baselines = result["baselines"]
    full = baselines["schedule"].count(1)
    table = Table(
        "for comparison", "FLOP", *prompts,
        title=f"{full} full steps at fixed spacing, the others at 2p: PSNR to plain in dB",
    )  # fmt: skip
    for row, values in baselines["rows"].items():
        table.add_row(row, f"{values['speedup_flop']:.2f}x", *(f"{db:.1f}" for db in values["psnr"].values()))
    console.print(table)
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


def _target_table(entry: Mapping[str, Any]) -> Table:
    table = Table(title=f"{entry['prompt']}: dB to the plain and to the converged picture")
    table.add_column("accelerate(pipe, ...)", overflow="fold")
    for heading in ("s", "clock", "FLOP", "plain", "converged", "full steps"):
        table.add_column(heading, no_wrap=True)  # 80 columns have to do
    for row, values in entry["rows"].items():
        plain = values["psnr"] is None
        table.add_row(
            "not called: the plain pipeline" if plain else row,
            f"{statistics.median(values['seconds']):.2f}",
            f"{values['speedup_wall_clock']:.2f}x",
            f"{values['speedup_flop']:.2f}x",
            "" if plain else f"{values['psnr']:.1f}",
            f"{values['psnr_converged']:.1f}",
            "all" if plain else f"{values['schedule'].count(1)}, {'fitted' if values['fitted'] else 'by rule'}",
        )
    return table
