"""Fits a schedule to a model, keeps it in a file, and draws another prompt with it.

    python examples/fit_schedule.py [FOLDER]

Two prompts and 12 steps keep it short here; four prompts at the number of steps you use are better.
"""

import sys
from pathlib import Path

import torch

import ddit_rt
from ddit_rt.demo import CALL_DEFAULTS, load_pipeline
from ddit_rt.trajectories import psnr

PROMPTS = ["a red apple on a black background", "a striped blue ball and a yellow star"]
CALL = {**CALL_DEFAULTS, "true_cfg_scale": 1.0, "num_inference_steps": 12}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    fitted = ddit_rt.fit(pipe, PROMPTS, speedup=2.0, **CALL)  # leaves the pipeline plain
    path = fitted.save(folder / "schedule.json")
    print(f"{path}: {fitted.speedup:.2f}x fewer FLOP at {fitted.psnr:.1f} dB on the prompts of the fit")

    def draw() -> torch.Tensor:
        seed = torch.Generator().manual_seed(5)
        return pipe("many dotted green squares", generator=seed, output_type="pt", **CALL).images

    plain = draw()
    with ddit_rt.accelerated(pipe, schedule=path):
        fast = draw()
    print(f"schedule {fitted.schedule}: {psnr(fast, plain):.1f} dB on another prompt")


if __name__ == "__main__":
    main()
