"""Measures methods against the plain pipeline and its plainest baselines, as ``ddit-rt eval`` does.

    python examples/compare_with_baselines.py [FOLDER]

An evaluation is plain data: methods, prompts, seeds. Run it again with the same FOLDER and nothing is measured twice.
"""

import sys
from pathlib import Path

from rich.console import Console

from ddit_rt.demo import CALL_DEFAULTS, DEMO_PROMPTS, load_pipeline
from ddit_rt.evaluate import Method, Plan, run_sweep, summarise, table

STEPS = 12
SPACED = [1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 2, 1]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/comparison")
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    methods = [
        Method("plain", "base", STEPS, STEPS),
        Method("fewer steps", "fewer steps", STEPS // 2, STEPS),
        Method(
            "extrapolation", "linear extrapolation", STEPS, STEPS, {"schedule": [0 if k > 1 else 1 for k in SPACED]}
        ),
        Method("coarse", "delta 2p", STEPS, STEPS, {"schedule": SPACED}),
        Method("threshold rule", "DDiT", STEPS, STEPS, {"threshold": 0.1}),
    ]
    call = {name: value for name, value in CALL_DEFAULTS.items() if name != "num_inference_steps"}
    prompts = [DEMO_PROMPTS["plain"], DEMO_PROMPTS["detailed"]]
    plan = Plan("demo", methods, prompts, call={**call, "true_cfg_scale": 1.0})
    rows = run_sweep(pipe, plan, folder, progress=False)
    Console(width=100).print(table(summarise(plan, rows), "against 12 plain steps"))


if __name__ == "__main__":
    main()
