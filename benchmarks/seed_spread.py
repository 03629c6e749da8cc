"""How a video model's clips of one prompt and two seeds differ, frame by frame: the measure of errors along a clip.

    python benchmarks/seed_spread.py demo-video --into benchmarks/results/demo-video/spread.json [--prompts FILE]

Runs the plain model alone, with two seeds per prompt. It can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddit_rt.evaluate import generate, growth_of, load_prompts, psnr_of_frames
from ddit_rt.pipeline import call_defaults, load_any


def measure(pipe: Any, call: dict[str, Any], prompt: str, seeds: tuple[int, int]) -> list[float]:
    """PSNR in dB of every frame of one clip to that of another, of the same prompt."""
    first, second = (generate(pipe, None, seed, **{**call, "prompt": prompt}).frames for seed in seeds)
    return psnr_of_frames(first, second)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="'demo-video', or a folder with a demo.json")
    parser.add_argument("--into", type=Path, required=True, help="file for the result; continued if begun")
    parser.add_argument("--prompts", help="as for ddit-rt eval; by default the model's own captions")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    prompts = load_prompts(options.prompts or options.model, options.count)
    known: dict[str, Any] = json.loads(options.into.read_text("utf-8")) if options.into.is_file() else {}
    clips: dict[str, list[float]] = known.get("clips", {}) if known.get("steps") == options.steps else {}
    call = {**call_defaults(options.model), "num_inference_steps": options.steps}
    pipe = load_any(options.model)
    options.into.parent.mkdir(parents=True, exist_ok=True)
    for prompt in prompts:
        if prompt in clips:
            continue
        print(prompt)
        clips[prompt] = [round(decibels, 3) for decibels in measure(pipe, call, prompt, (0, 1))]
        growths = [growth_of(decibels) for decibels in clips.values()]
        content = {
            "model": options.model,
            "steps": options.steps,
            "psnr_frames": [round(statistics.fmean(column), 3) for column in zip(*clips.values())],
            "growth": round(statistics.fmean(growths), 3),
            "growth_spread": round(statistics.pstdev(growths), 3),
            "clips": clips,
        }
        options.into.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
