"""Runs of few steps that start coarse: what the pictures show, and how they compare with drawn ones.

    ddit-rt eval demo --methods benchmarks/few-steps.json --output RUN --count 128 --no-converged --metrics psnr
    python benchmarks/few_steps.py RUN --into benchmarks/results/demo-few/few-steps.json

A run that is coarse from pure noise on makes another picture, so closeness to the plain one says little. Judged are
prompt adherence, and the Fréchet distance to scenes that were drawn as the training data was and that the model has not
seen. Inception's weights cannot be had everywhere, so its features here are those of the network that reads adherence,
averaged over the picture: comparable within one table and with nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from target_tables import DEARER

from ddit_rt.evaluate import Plan, compare, read_rows, summarise
from ddit_rt.evaluate.adherence import adherence, load_reader
from ddit_rt.evaluate.judges import fid
from ddit_rt.evaluate.sweep import pictures_of
from examples.demo_model.scenes import render, sample_scene

SEED = 10**9
"""Of the first drawn scene; training takes small ones."""
DRAWN = 1024
SIDE = 128


class Features(torch.nn.Module):
    """What the Fréchet distance is taken of: the reader's features, averaged over a picture."""

    num_features = 72

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, 128, 128) -> (N, 72)."""
        return load_reader().features(pictures.float() / 255).mean((2, 3))


def draw(folder: Path, first: int) -> list[Path]:
    """Scenes of the training data's kind as files, those from seed ``first`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.png" for seed in range(first, first + DRAWN)]
    for seed, path in zip(range(first, first + DRAWN), paths):
        if not path.is_file():
            Image.fromarray(render(sample_scene(Random(seed)), SIDE)).save(path)
    return paths


def measure(run: Path) -> dict[str, Any]:
    """Per method: FLOP in steps of the model, adherence per picture, Fréchet distance to drawn scenes."""
    plan = Plan.read(run)
    if (plan.call["height"], plan.call["width"]) != (SIDE, SIDE):
        raise SystemExit(f"{run} holds pictures of another size than {SIDE} x {SIDE}.")
    real, others = draw(run / "drawn", SEED), draw(run / "drawn", SEED + DRAWN)
    distance, share = fid(Features()), adherence()
    ratios = {row.method: row.flops_speedup for row in summarise(plan, read_rows(run)) if row.flops_speedup is not None}
    methods = []
    for method in plan.methods:
        made = list(pictures_of(run, plan, method))
        if len(made) != len(plan.prompts) * len(plan.seeds):
            raise SystemExit(f"{method.name} lacks pictures: finish the evaluation first.")
        files = [path for _, _, path in made]
        found = share(files, files, [plan.prompts[index] for index, _, _ in made])
        methods.append(
            {
                **method.to_dict(),
                "cost": round(method.reference / ratios[method.name], 3),
                "frechet": round(distance(files, real, [])[0], 4),
                "adherence": [round(value, 4) for value in found],
            }
        )
    # as many drawn scenes as there are pictures: what no model could be expected to fall below
    floor = distance(others[: len(files)], real, [])[0]
    return {"pictures": len(files), "drawn": DRAWN, "floor": round(floor, 4), "call": plan.call, "methods": methods}


def few_steps_table(result: dict[str, Any]) -> str:
    """One line per method, by the plain run it is beside and then by cost; p compares adherence with fewer steps."""
    lines = [
        f"{result['pictures']} pictures of the demo model, guidance {result['call'].get('true_cfg_scale', 1):g}. Drawn "
        f"scenes themselves, as many, are at a distance of {result['floor']:.2f} from {result['drawn']} others.",
        "",
        "| plain steps | method | cost, in full steps | adherence | distance to drawn scenes | adherence beside "
        f"the best full run of at most {DEARER:g} times the cost | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(result["methods"], key=lambda one: (one["reference"], -one["cost"])):
        mean = statistics.fmean(entry["adherence"])
        lines.append(
            f"| {entry['reference']} | {_name(entry)} | {entry['cost']:.1f} | {mean:.3f} | {entry['frechet']:.2f} | "
            f"{' | '.join(_beside(result['methods'], entry))} |"
        )
    return "\n".join(lines)


def _schedule(entry: dict[str, Any]) -> list[int]:
    """Patch sizes of a run that starts coarse; empty for one of full steps."""
    return (entry["settings"] or {}).get("schedule", [])


def _name(entry: dict[str, Any]) -> str:
    if entry["kind"] == "base":
        return "plain"
    if not _schedule(entry):
        return f"{entry['kind']}: {entry['steps']}"
    sizes = [{1: "p"}.get(k, f"{k}p") for k in _schedule(entry)]
    runs = [f"{sizes.count(size)} {size}" for size in dict.fromkeys(sizes)]
    return f"{entry['kind']}: {', '.join(runs)}"


def _beside(methods: Sequence[dict[str, Any]], entry: dict[str, Any]) -> tuple[str, str]:
    """Gain in adherence over the full runs that cost at most a tenth more, and Wilcoxon's p; of coarse runs alone."""
    if not _schedule(entry):
        return "", ""
    full = [one for one in methods if not _schedule(one) and one["cost"] <= DEARER * entry["cost"]]
    if not full:
        return "", ""
    best = max(full, key=lambda one: statistics.fmean(one["adherence"]))
    rows = [
        {"method": one["name"], "prompt": number, "seed": 0, "adherence": value}
        for one in (entry, best)
        for number, value in enumerate(one["adherence"])
    ]
    found = compare(rows, entry["name"], best["name"], "adherence")
    assert found is not None
    return f"{found.difference:+.3f} ({_name(best)})", f"{found.p:.2g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of ddit-rt eval")
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args(arguments)
    result = measure(options.run)
    options.into.parent.mkdir(parents=True, exist_ok=True)
    options.into.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(few_steps_table(result))


if __name__ == "__main__":
    main()
