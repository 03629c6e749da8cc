"""Schedules of your own: a list with one multiple per step, or a function that decides step by step.

python examples/own_schedule.py
"""

from collections.abc import Mapping

import torch

import ddit_rt
from ddit_rt.demo import CALL_DEFAULTS, load_pipeline
from ddit_rt.trajectories import psnr

STEPS = 12
CALL = {**CALL_DEFAULTS, "true_cfg_scale": 1.0, "num_inference_steps": STEPS}

# full, coarse at 4p, skipped: the first steps full, and the last
LIST = [1, 1, 1, 4, 0, 1, 4, 0, 1, 4, 0, 1]


def late(step: int, sigmas: Mapping[int, float]) -> int:
    """Full in the first half, then one full step in two. ``sigmas``: multiple -> σ, empty while the history fills."""
    return 1 if step < STEPS // 2 or step % 2 else 2


def main() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        return pipe("a yellow star on a blue background", generator=seed, output_type="pt", **CALL).images

    plain = draw()
    for schedule in (LIST, late):
        with ddit_rt.accelerated(pipe, schedule=schedule):
            fast = draw()
            report = ddit_rt.report(pipe)
        print(f"{report.schedule}: {report.speedup_estimate:.2f}x fewer FLOP, {psnr(fast, plain):.1f} dB")


if __name__ == "__main__":
    main()
