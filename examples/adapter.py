"""A trained adapter beside untrained coarse steps, at one schedule.

    python examples/adapter.py

The adapter is the one that ships with the demo model; ``ddit-rt distill train`` makes one for your model. It was
trained at 28 and 50 steps, so at the few of this script its numbers say little.
"""

import torch

import ddit_rt
from ddit_rt.demo import ADAPTER, CALL_DEFAULTS, load_pipeline
from ddit_rt.trajectories import psnr

CALL = {**CALL_DEFAULTS, "true_cfg_scale": 1.0, "num_inference_steps": 12}
SCHEDULE = [1, 1, 1, 1, 2, 2, 1, 2, 2, 1, 1, 1]


def main() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    adapter = ddit_rt.load_adapter(ADAPTER)

    def draw() -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        return pipe("zebras behind a fence", generator=seed, output_type="pt", **CALL).images

    plain = draw()
    for name, settings in {"delta": {}, "adapter": {"adapter": adapter}}.items():
        with ddit_rt.accelerated(pipe, schedule=SCHEDULE, **settings):
            fast = draw()
            report = ddit_rt.report(pipe)
        print(f"{name}: {report.speedup_estimate:.2f}x fewer FLOP, {psnr(fast, plain):.1f} dB")


if __name__ == "__main__":
    main()
