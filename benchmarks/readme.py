"""Writes the README's tables and picture from finished runs: ``python benchmarks/readme.py [demo-out]``.

The demo's measurements are copied to docs/demo/demo.json, so that what the README shows can be traced to a run; the
comparison is read from benchmarks/results/demo, where ``ddit-rt eval demo --output benchmarks/results/demo`` put it.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ddit_rt.demo.pipeline import FITTED
from ddit_rt.schedule.fitted import FittedSchedule
from ddit_rt.schedule.plots import COLOURS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "demo"
EVALUATION = ROOT / "benchmarks" / "results" / "demo"
GUIDED = ROOT / "benchmarks" / "results" / "demo-guided"
OPTIONS = ROOT / "benchmarks" / "results" / "demo-options"


def table(result: dict) -> str:
    """The demo's tables as Markdown."""
    where = f"{result['steps']} steps, τ = {result['threshold']:.3g}, {result['machine']['threads']} CPU threads, " + (
        f"torch {result['versions']['torch']}, seed {result['seed']}"
    )
    lines = [
        f"Demo model, 128 x 128 pixels, 256 tokens at p, {where}.",
        "",
        "| prompt | plain, s | accelerated, s | wall-clock | by FLOP | PSNR, dB | SSIM | full steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["prompts"].values():
        plain, fast = (statistics.median(entry[f"seconds_{side}"]) for side in ("plain", "accelerated"))
        lines.append(
            f"| {entry['prompt']} | {plain:.2f} | {fast:.2f} | {entry['speedup_wall_clock']:.2f}x | "
            f"{entry['speedup_flop']:.2f}x | {entry['psnr']:.1f} | {entry['ssim']:.3f} | {entry['full_steps']} |"
        )
    baselines = result["baselines"]
    names = [entry["prompt"] for entry in result["prompts"].values()]
    lines += [
        "",
        f"Fitted schedules, and one fixed one ({baselines['schedule'].count(1)} full steps, the others at 2p) filled "
        f"in different ways; mean PSNR in dB over {baselines['seeds']} seeds (lowest to highest):",
        "",
        "| steps by | by FLOP | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row, values in baselines["rows"].items():
        cells = (
            f"{statistics.mean(decibels):.1f} ({min(decibels):.1f} to {max(decibels):.1f})"
            for decibels in values["psnr"].values()
        )
        lines.append(f"| {row} | {values['speedup_flop']:.2f}x | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every step at one size (band-split):",
        "",
        "| size | tokens | GFLOP a step | ms a step | wall-clock | by FLOP | PSNR, dB |",
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


def evaluation_table(results: dict) -> str:
    """The comparison against the longest plain run as Markdown, fastest method last."""
    steps = max(row["reference"] for row in results["results"])
    rows = sorted((row for row in results["results"] if row["reference"] == steps), key=lambda row: row["speedup"])
    judged = any("adherence" in row["metrics"] for row in rows)
    call, prompts = results["plan"]["call"], results["plan"]["prompts"]
    lines = [
        f"{len(prompts)} prompts, {steps} steps, guidance {call.get('true_cfg_scale', 1):g} (1: none), "
        "one CPU thread per run; wall-clock: median over the prompts of a whole call's time beside the plain call's.",
        "",
        "| method | wall-clock | by FLOP | PSNR, dB | SSIM |" + (" prompt adherence |" if judged else ""),
        "|---|---|---|---|---|" + ("---|" if judged else ""),
    ]
    for row in rows:
        metrics, plain = row["metrics"], row["kind"] == "base"
        flops = "" if row["flops_speedup"] is None else f"{row['flops_speedup']:.2f}x"
        cells = ["" if plain else f"{metrics['psnr']:.1f} ± {row['spread']['psnr']:.1f}"]
        cells += ["" if plain else f"{metrics['ssim']:.3f}"]
        cells += [f"{metrics['adherence']:.3f}" if "adherence" in metrics else ""] * judged
        name = f"**{row['method']}**" if row["kind"].startswith(("DDiT", "adapter", "fitted")) else row["method"]
        lines.append(
            f"| {name.replace(f'@{steps}', '')} | {row['speedup']:.2f}x | {flops} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def options_table(results: dict) -> str:
    """What single settings are worth, a line per kind of setting."""
    kinds: dict[str, list[str]] = {}
    for row in results["results"]:
        if row["kind"] != "base":
            # the kind says the rest
            name = re.sub(r"^(residual|free-first|first|one-full-in|cycle)-|-full$", "", row["method"].split("@")[0])
            found = f"{name}: {row['metrics']['psnr']:.1f} ({row['flops_speedup']:.2f}x)"
            kinds.setdefault(row["kind"], []).append(found)
    head = f"{len(results['plan']['prompts'])} prompts, no guidance; dB (FLOP ratio)."
    rows = (f"| {kind} | {'; '.join(found)} |" for kind, found in kinds.items())
    return "\n".join([head, "", "| setting | |", "|---|---|", *rows])


SHOWN = {
    "base": "plain",
    "fitted-2x": "fitted, 2x",
    "fitted-3x": "fitted, 3x",
    "ddit-1.6x": "DDiT by τ, 1.6x",
    "extrapolate-3": "extrapolate, 1 in 3",
    "delta-2p-3": "delta 2p, 1 in 3",
    "adapter-2p-3": "adapter 2p, 1 in 3",
    "teacache-2x": "TeaCache 2x",
    "band-split-3": "band-split 2p, 1 in 3",
    "naive-3": "naive 2p, 1 in 3",
}
SHOWN_PROMPTS = 5


def sheet(results: dict, target: Path) -> None:
    """Some methods side by side, from the evaluation's saved pictures: a column per method, a row per prompt."""
    steps = max(row["reference"] for row in results["results"])
    psnr = {row["method"]: row["metrics"].get("psnr") for row in results["results"]}
    figure = Figure(figsize=(1.5 * len(SHOWN), 1.6 * SHOWN_PROMPTS + 0.4), layout="constrained")
    grid = figure.subplots(SHOWN_PROMPTS, len(SHOWN), squeeze=False)
    for row in range(SHOWN_PROMPTS):
        for column, (method, title) in enumerate(SHOWN.items()):
            axes, name = grid[row][column], f"{method}@{steps}"
            axes.imshow(Image.open(EVALUATION / "pictures" / name / f"{row:04d}-0.png"))
            axes.set_xticks([])
            axes.set_yticks([])
            if not row:
                axes.set_title(title if method == "base" else f"{title}\n{psnr[name]:.0f} dB on average", fontsize=7)
    figure.savefig(target, dpi=110)


def picture(result: dict, folder: Path, target: Path) -> None:
    """Plain beside accelerated per prompt, over the strip of patch sizes."""
    prompts = result["prompts"]
    figure = Figure(figsize=(4.6 * len(prompts), 3.1), layout="constrained")
    grid = figure.subplots(2, 2 * len(prompts), height_ratios=(8, 1), squeeze=False)
    for i, (name, entry) in enumerate(prompts.items()):
        notes = ("plain", f"accelerated, {entry['speedup_wall_clock']:.1f}x faster, {entry['psnr']:.0f} dB")
        for j, (side, note) in enumerate(zip(("plain", "accelerated"), notes)):
            axes = grid[0][2 * i + j]
            axes.imshow(Image.open(folder / f"{name}-{side}.png"))
            axes.set_title(note, fontsize=8)
            axes.axis("off")
            strip = grid[1][2 * i + j]
            schedule = entry["schedule"] if j else [1] * result["steps"]
            strip.bar(range(len(schedule)), [1] * len(schedule), width=1, color=[COLOURS[k] for k in schedule])
            strip.set_xticks([])
            strip.set_yticks([])
            strip.set_xlabel(
                f"“{entry['prompt']}”" if not j else "patch size per step: blue p, yellow 2p, red 4p", fontsize=7
            )
    figure.savefig(target, dpi=140)


def fitted_picture(target: Path) -> None:
    """The shipped schedules over the sensitivity they were found with."""
    found = {speedup: FittedSchedule.load(path) for speedup, path in FITTED.items()}
    figure = Figure(figsize=(8, 3), layout="constrained")
    curve, *strips = figure.subplots(1 + len(found), 1, sharex=True, height_ratios=(5, *[1] * len(found)))
    sensitivity = next(iter(found.values())).sensitivity
    curve.semilogy(range(len(sensitivity)), sensitivity, color="black")
    curve.set_ylabel("an error comes out\nso many times larger", fontsize=8)
    curve.grid(alpha=0.2)
    for axes, (speedup, one) in zip(strips, found.items()):
        colours = [COLOURS[k] for k in one.schedule]
        axes.bar(range(len(one.schedule)), [1] * len(one.schedule), width=1, color=colours)
        axes.set_yticks([])
        axes.set_ylabel(f"{speedup}x", rotation=0, labelpad=12, va="center", fontsize=8)
    strips[-1].set_xlabel("denoising step; blue p, yellow 2p, red 4p, grey: no model call", fontsize=8)
    figure.savefig(target, dpi=110)


def put(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = text.split(begin)
    return head + begin + "\n" + content + "\n" + end + rest.split(end)[1]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if (folder / "demo.json").is_file():
        result = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        picture(result, folder, DOCS / "picture.png")
        text = put(text, "demo-table", table(result))
    fitted_picture(DOCS / "fitted.png")
    if (EVALUATION / "results.json").is_file():
        results = json.loads((EVALUATION / "results.json").read_text(encoding="utf-8"))
        text = put(text, "evaluation-table", evaluation_table(results))
        if (EVALUATION / "pictures").is_dir():
            sheet(results, DOCS / "methods.png")
    if (GUIDED / "results.json").is_file():
        results = json.loads((GUIDED / "results.json").read_text(encoding="utf-8"))
        text = put(text, "guided-table", evaluation_table(results))
    if (OPTIONS / "results.json").is_file():
        results = json.loads((OPTIONS / "results.json").read_text(encoding="utf-8"))
        text = put(text, "options-table", options_table(results))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
