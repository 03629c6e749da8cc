"""Tables of targets, from evaluations whose answers are known."""

import target_tables
from evaluations import Evaluation

from ddit_rt.evaluate import Method, Plan

STEPS = 8
FITTED = {"fitted": {"schedule": [1, 1, 0, 1, 0, 0, 1, 0], "speedup": 2.0, "psnr": 45.0, "prompts": 8}}
RULE = {"target": {"speedup": 2}}
# method -> kind, settings, and dB to plain and to converged on two prompts
METHODS = {
    "base@8": ("base", None, (100, 100), (30, 20)),
    "toward-0.3-fitted-2x@8": ("DDiT, between", {**FITTED, "toward_converged": 0.3}, (42, 38), (33, 19)),
    "fitted-2x@8": ("DDiT, fitted", FITTED, (50, 40), (31, 18)),
    "toward-1-fitted-2x@8": ("DDiT, between", {**FITTED, "toward_converged": 1}, (30, 28), (41, 27)),
    "toward-0.3-target-2x@8": ("DDiT, between", {**RULE, "toward_converged": 0.3}, (40, 36), (35, 21)),
    "target-2x@8": ("DDiT, target", RULE, (44, 38), (30, 20)),
    "converged-2x@8": ("DDiT, converged", {"target": {"speedup": 2}}, (29, 27), (44, 30)),
    "converged-3x@8": ("DDiT, converged", {"target": {"speedup": 3}}, (29, 27), (40, 28)),
}


def evaluation() -> Evaluation:
    methods = [Method(name, kind, STEPS, STEPS, settings) for name, (kind, settings, *_) in METHODS.items()]
    rows = []
    for name, (_, _, to_plain, to_converged) in METHODS.items():
        rows.append({"method": name, "flops": 8.0 if name == "base@8" else 4.0})
        for prompt in (0, 1):
            metrics = {"psnr": to_plain[prompt], "psnr_converged": to_converged[prompt]}
            rows.append({"method": name, "prompt": prompt, "seed": 0, "seconds": 1, "reference_seconds": 2, **metrics})
    plan = Plan("demo", methods, ["a", "b"], [0], {}, converged=True)
    return Evaluation({}, plan, rows, {name: {} for name in METHODS}, {name: [] for name in METHODS})


def test_runs_between_stand_beside_those_that_aim_at_either_end():
    _, _, plain, *lines = target_tables.between_table(evaluation(), STEPS).splitlines()
    assert plain == "| plain pipeline | | | | 25.0 (20.0) | |"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in cells] == [
        ["2x", "fitted", "0"],
        ["2x", "fitted", "0.3"],
        ["2x", "fitted", "1"],
        ["2x", "rule", "0"],
        ["2x", "rule", "0.3"],
        ["2x", "rule", '`reference="converged"`'],
    ]
    assert cells[1][3:] == ["40.0 (38.0)", "26.0 (19.0)", "1 of 2"]
    assert [row[5] for row in cells] == ["1 of 2", "1 of 2", "2 of 2", "0 of 2", "2 of 2", "2 of 2"]
