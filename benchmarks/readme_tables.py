"""The tables of the README and of the documentation, in Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any

from evaluations import Evaluation

from ddit_rt.evaluate import TO_CONVERGED, Comparison, Summary, compare

CONVERGED = TO_CONVERGED["psnr"]

OURS = ("DDiT", "adapter", "fitted")
"""How the kinds of methods begin that this package adds; their names are printed bold."""

PLAIN = "base@50"
"""The plain run of the README's table."""

SHORT = {
    "fitted-1.5x@50": "fitted schedule, 1.5x",
    "fitted-2x@50": "fitted schedule, 2x",
    "fitted-3x@50": "fitted schedule, 3x",
    "fitted-4x@50": "fitted schedule, 4x",
    "extrapolate-2@50": "linear extrapolation, 1 full step in 2",
    "extrapolate-4@50": "linear extrapolation, 1 full step in 4",
    "teacache-2x@50": "TeaCache, 2x",
    "teacache-3x@50": "TeaCache, 3x",
    "25-steps@50": "25 plain steps",
    "17-steps@50": "17 plain steps",
    "ddit-1.6x@50": "DDiT's threshold rule, untrained coarse steps",
}
"""Method -> its name in the README's table, in the table's order."""

PAIRS = (
    ("fitted-2x@50", "extrapolate-2@50"),
    ("fitted-3x@50", "extrapolate-4@50"),
    ("fitted-2x@50", "teacache-2x@50"),
    ("fitted-3x@50", "teacache-3x@50"),
    ("fitted-2x@50", "25-steps@50"),
    ("fitted-3x@50", "17-steps@50"),
    ("fitted-2x@50", "fitted-skipped-2x@50"),
    ("fitted-3x@50", "fitted-skipped-3x@50"),
    ("fitted-4x@50", "fitted-skipped-4x@50"),
    ("fitted-coarse-1.5x@50", "ddit-1.6x@50"),
    ("fitted-adapter-2x@50", "fitted-2x@50"),
    ("fitted-adapter-3x@50", "fitted-3x@50"),
    ("fitted-adapter-4x@50", "fitted-4x@50"),
    ("fitted-2x@28", "fitted-skipped-2x@28"),
    ("fitted-2x@50", "unipc-25@50"),
    ("fitted-3x@50", "unipc-17@50"),
    ("fitted-4x@50", "unipc-12@50"),
    ("teacache-2x@50", "unipc-25@50"),
    ("teacache-3x@50", "unipc-17@50"),
)
"""Methods that are compared prompt by prompt, where the evaluation has both."""


def short_table(evaluation: Evaluation) -> str:
    """The README's few rows; with the distance to the converged picture where it was measured, of the plain one too."""
    found = {summary.method: summary for summary in evaluation.summaries()}
    second = any(CONVERGED in row.metrics for row in found.values())
    names = {PLAIN: "plain pipeline, 50 steps"} | SHORT if second else SHORT
    lines = [
        "| method | FLOP | wall-clock | PSNR, dB | SSIM |" + " PSNR to converged, dB | worst tenth |" * second,
        "|---|---|---|---|---|" + "---|---|" * second,
    ]
    for method, name in names.items():
        row = found[method]
        cells = [
            name,
            f"{row.flops_speedup:.2f}x",
            f"{row.speedup:.2f}x",
            _cell(row.metrics, "psnr", 1),
            _cell(row.metrics, "ssim", 3),
            *[_cell(row.metrics, CONVERGED, 1), _cell(row.worst, CONVERGED, 1)] * second,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluation_table(evaluation: Evaluation, reference: int) -> str:
    """Every method that is compared with ``reference`` plain steps, the fastest last."""
    rows = sorted(evaluation.summaries(reference), key=lambda row: row.speedup)
    judged = any("adherence" in row.metrics for row in rows)
    second = any(CONVERGED in row.metrics for row in rows)
    lines = [
        f"{len(evaluation.plan.prompts)} prompts, {reference} steps, {guidance_of(evaluation)}, "
        "one CPU thread per run.",
        "",
        "| method | wall-clock | FLOP | PSNR, dB | worst tenth | SSIM |"
        + " PSNR to converged, dB | worst tenth |" * second
        + " prompt adherence |" * judged,
        "|---|---|---|---|---|---|" + "---|---|" * second + "---|" * judged,
    ]
    for row in rows:
        name = row.method.replace(f"@{reference}", "")
        cells = [
            f"**{name}**" if row.kind.startswith(OURS) else name,
            f"{row.speedup:.2f}x",
            f"{row.flops_speedup:.2f}x",
            with_spread(row, "psnr"),
            _cell(row.worst, "psnr", 1),
            _cell(row.metrics, "ssim", 3),
            *[with_spread(row, CONVERGED), _cell(row.worst, CONVERGED, 1)] * second,
            *[f"{row.metrics.get('adherence', float('nan')):.3f}"] * judged,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_spread(row: Summary, metric: str) -> str:
    """Mean and standard deviation, or a dash where there is none."""
    return f"{row.metrics[metric]:.1f} ± {row.spread[metric]:.1f}" if metric in row.metrics else "-"


def _cell(values: Mapping[str, float], metric: str, digits: int) -> str:
    """A value, or a dash where there is none: the plain picture has no distance from itself."""
    return f"{values[metric]:.{digits}f}" if metric in values else "-"


def paired_table(evaluation: Evaluation) -> str:
    """Differences of PSNR on the same prompts: a 95 % interval of their mean, and whether chance could make them."""
    speed = {summary.method: summary.flops_speedup for summary in evaluation.summaries()}
    second = any(CONVERGED in row for row in evaluation.rows)
    lines = [
        "| method (FLOP) | less (FLOP) | mean difference of PSNR, dB | 95 % interval | p | better on |"
        + " to converged, dB | 95 % interval | p | better on |" * second,
        "|---|---|---|---|---|---|" + "---|---|---|---|" * second,
    ]
    for first, other in PAIRS:
        if first not in speed or other not in speed:
            continue
        cells = [f"{first} ({speed[first]:.2f}x)", f"{other} ({speed[other]:.2f}x)"]
        for metric in ("psnr", CONVERGED)[: 1 + second]:
            cells += _compared(compare(evaluation.rows, first, other, metric))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(found: Comparison | None) -> list[str]:
    """Mean difference, interval, p and wins; dashes where nothing was measured."""
    if found is None:
        return ["-"] * 4
    p = f"{found.p:.2g}" if found.p >= 1e-4 else "< 0.0001"
    interval = f"{found.low:+.1f} to {found.high:+.1f}"
    return [f"{found.difference:+.1f}", interval, p, f"{found.better} of {found.runs}"]


def options_table(evaluation: Evaluation) -> str:
    """What single settings are worth, a line per kind of setting."""
    kinds: dict[str, list[str]] = {}
    for row in evaluation.summaries():
        if row.kind != "base":
            # the kind says the rest
            name = re.sub(r"^(residual|skipped-first|first|one-full-in|cycle)-|-full$", "", row.method)
            kinds.setdefault(row.kind, []).append(f"{name}: {row.metrics['psnr']:.1f} ({row.flops_speedup:.2f}x)")
    head = f"{len(evaluation.plan.prompts)} prompts, {guidance_of(evaluation)}; PSNR in dB (FLOP)."
    rows = (f"| {kind} | {'; '.join(found)} |" for kind, found in kinds.items())
    return "\n".join([head, "", "| setting | |", "|---|---|", *rows])


def analyses_table(lines: list[dict[str, Any]]) -> str:
    """One of the paper's analyses."""
    rows = ["| | τ | wall-clock | FLOP | PSNR, dB | SSIM |", "|---|---|---|---|---|---|"]
    for line in lines:
        tau = "" if line["threshold"] is None else f"{line['threshold']:.2g}"
        quality = "" if line["psnr"] == 100.0 else f"{line['psnr']:.1f}"  # 100 stands for the very same picture
        rows.append(
            f"| {line['label']} | {tau} | {line['speedup']:.2f}x | {line['flops_speedup']:.2f}x | {quality} | "
            f"{line['ssim']:.3f} |"
        )
    return "\n".join(rows)


def demo_tables(result: dict[str, Any]) -> str:
    """What ``ddit-rt demo`` measured."""
    lines = [
        f"128 x 128 pixels, 256 tokens at p, {result['steps']} steps, guidance 3, {result['machine']['threads']} CPU "
        f"threads, torch {result['versions']['torch']}, seed {result['seed']}.",
        "",
        "| prompt | `accelerate(pipe, ...)` | s | wall-clock | FLOP | dB to plain | dB to converged |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["prompts"].values():
        for row, values in entry["rows"].items():
            plain = values["psnr"] is None
            cells = [
                entry["prompt"],
                "not called: the plain pipeline" if plain else f"`{row}`",
                f"{statistics.median(values['seconds']):.2f}",
                f"{values['speedup_wall_clock']:.2f}x",
                f"{values['speedup_flop']:.2f}x",
                "" if plain else f"{values['psnr']:.1f}",
                f"{values['psnr_converged']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    baselines = result["baselines"]
    names = [entry["prompt"] for entry in result["prompts"].values()]
    lines += [
        "",
        f"For comparison, one schedule with {baselines['schedule'].count(1)} full steps whose other steps are filled "
        "in several ways, fewer steps, and the paper's rule. PSNR to plain in dB:",
        "",
        "| steps by | FLOP | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row, values in baselines["rows"].items():
        cells = [f"{decibels:.1f}" for decibels in values["psnr"].values()]
        lines.append(f"| {row} | {values['speedup_flop']:.2f}x | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every step at one size (band-split):",
        "",
        "| size | tokens | GFLOP a step | ms a step | wall-clock | FLOP | PSNR, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in result["sizes"]:
        name = "p" if size["multiple"] == 1 else f"{size['multiple']}p"
        quality = "" if size["psnr"] is None else f"{size['psnr']:.1f}"
        lines.append(
            f"| {name} | {size['tokens']} | {size['gflop_per_step']:.2f} | {size['seconds_per_step'] * 1e3:.1f} | "
            f"{size['speedup_wall_clock']:.2f}x | {size['speedup_flop']:.2f}x | {quality} |"
        )
    return "\n".join(lines)


def guidance_of(evaluation: Evaluation) -> str:
    """How the model was guided, in words."""
    call = evaluation.plan.call
    scale = call.get("true_cfg_scale", call.get("guidance_scale", 1))
    return f"guidance {scale:g}" if scale > 1 else "no guidance"
