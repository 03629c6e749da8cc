"""Writes the README's demo table and picture from a finished demo: ``python benchmarks/readme.py [demo-out]``.

Copies the measurements to docs/demo/demo.json, so that what the README shows can be traced to a run.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ddit_rt.schedule.plots import COLOURS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "demo"


def table(result: dict) -> str:
    """The demo's tables as Markdown."""
    where = f"{result['steps']} steps, τ = {result['threshold']:.3g}, {result['machine']['threads']} CPU threads, " + (
        f"torch {result['versions']['torch']}, seed {result['seed']}"
    )
    lines = [
        f"Demo model, 128 x 128 pixels, 256 tokens at p, {where}.",
        "",
        "| prompt | plain, s | accelerated, s | by the clock | by FLOP | PSNR, dB | SSIM | fine steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["prompts"].values():
        plain, fast = (statistics.median(entry[f"seconds_{side}"]) for side in ("plain", "accelerated"))
        lines.append(
            f"| {entry['prompt']} | {plain:.2f} | {fast:.2f} | {entry['speedup_clock']:.2f}x | "
            f"{entry['speedup_flop']:.2f}x | {entry['psnr']:.1f} | {entry['ssim']:.3f} | {entry['fine_steps']} |"
        )
    rivals = result["rivals"]
    names = [entry["prompt"] for entry in result["prompts"].values()]
    lines += [
        "",
        f"One schedule ({rivals['schedule'].count(1)} fine steps, the others at 2p), filled in different ways;"
        f" mean PSNR in dB over {rivals['seeds']} noises (lowest to highest):",
        "",
        "| coarse steps by | by FLOP | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row, values in rivals["rows"].items():
        cells = (
            f"{statistics.mean(decibels):.1f} ({min(decibels):.1f} to {max(decibels):.1f})"
            for decibels in values["psnr"].values()
        )
        lines.append(f"| {row} | {values['speedup_flop']:.2f}x | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every step at one size (band-split):",
        "",
        "| size | tokens | GFLOP a step | ms a step | by the clock | by FLOP | PSNR, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in result["sizes"]:
        name = "p" if size["multiple"] == 1 else f"{size['multiple']}p"
        quality = "" if size["psnr"] is None else f"{size['psnr']:.1f}"
        lines.append(
            f"| {name} | {size['tokens']} | {size['gflop_per_step']:.2f} | {size['seconds_per_step'] * 1e3:.1f} | "
            f"{size['speedup_clock']:.2f}x | {size['speedup_flop']:.2f}x | {quality} |"
        )
    return "\n".join(lines)


def picture(result: dict, folder: Path, target: Path) -> None:
    """Plain beside accelerated per prompt, over the strip of patch sizes."""
    prompts = result["prompts"]
    figure = Figure(figsize=(4.6 * len(prompts), 3.1), layout="constrained")
    grid = figure.subplots(2, 2 * len(prompts), height_ratios=(8, 1), squeeze=False)
    for i, (name, entry) in enumerate(prompts.items()):
        notes = ("plain", f"accelerated, {entry['speedup_clock']:.1f}x faster, {entry['psnr']:.0f} dB")
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


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    result = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture(result, folder, DOCS / "picture.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- demo-table -->", "<!-- /demo-table -->"
    head, rest = text.split(begin)
    readme.write_text(head + begin + "\n" + table(result) + "\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
