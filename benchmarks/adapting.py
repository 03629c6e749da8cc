"""What adapting to the prompt could win at equal mean FLOP, from finished runs and what a step shows of a prompt.

    python benchmarks/adapting.py EVALUATION SCHEDULE RUNS FILE

takes an evaluation of ``benchmarks/targets.json`` that :mod:`evaluations` condensed, and a fitted schedule of the same
number of steps or another, for its sensitivity. It records the plain run of every prompt once more, in the file RUNS
(.npz) if that is not there yet, and writes into FILE an answer to: had each
prompt its own number of evaluations by the rule, with the same mean, how near to plain would the worst tenth end, if
they were chosen by

- what each prompt's runs in fact came to at every number (an oracle),
- the errors of first order that forecasts make along the prompt's whole plain run, under one sensitivity for all,
- those that the first third of the run shows, when there is still something to choose.

And what a placement of its own would win every prompt over one that was searched for the other prompts, to first order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from evaluations import Evaluation
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ddit_rt.fitting import ErrorModel, find_evaluations
from ddit_rt.pipeline import load_any
from ddit_rt.schedule import WARP, FittedSchedule, schedule_of
from ddit_rt.trajectories import record_trajectory

Array = NDArray[np.float64]

FOLDS = 4
"""Groups of prompts; a placement is searched on the others."""
SEEN = 1 / 3
"""Share of a run after which its number of evaluations is chosen."""
NUMBERS = 512
"""That a prediction is reduced to."""
RULE = "target-"


def record(evaluation: Evaluation, steps: int, runs: Path) -> None:
    """Keeps the plain runs of the evaluation's prompts, from its first seed, every prediction as :data:`NUMBERS`."""
    plan = evaluation.plan
    pipe = load_any(plan.model, None, "cpu")
    pipe.set_progress_bar_config(disable=True)
    full, floor = [], []
    for prompt in plan.prompts:
        call = {**plan.call, "prompt": prompt, "num_inference_steps": steps}
        trajectory = record_trajectory(pipe, plan.seeds[0], **call)
        full.append(np.stack([sketch(output.numpy().ravel()) for output in trajectory.outputs]))
        floor.append(1e-6 * float(trajectory.latents[-1].float().square().mean()))
        print(f"{len(full)} of {len(plan.prompts)}: {prompt}", flush=True)
    np.savez(runs, full=np.stack(full, 1), floor=np.array(floor), sigmas=trajectory.sigmas.numpy())


def sketch(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of entries of random sign, which keep the mean square of all on average."""
    random = np.random.default_rng(0)
    share = values.size // NUMBERS
    mixed = (random.choice((-1, 1), values.size) * values)[random.permutation(values.size)][: share * NUMBERS]
    return (mixed.reshape(NUMBERS, share).sum(1) / np.sqrt(share)).astype(np.float32)


def read(runs: Path, sensitivity: list[float]) -> ErrorModel:
    """What was kept, with one sensitivity for all prompts."""
    with np.load(runs) as kept:
        full, floor, sigmas = kept["full"], kept["floor"], kept["sigmas"]
    steps = len(full)
    places = np.linspace(0, 1, steps), np.linspace(0, 1, len(sensitivity))
    gains = np.exp(np.interp(*places, np.log(sensitivity)))
    return ErrorModel(sigmas, full, {}, {}, gains, (0,) * steps, floor)


def measured(evaluation: Evaluation, steps: int) -> tuple[Array, Array]:
    """Evaluations that the rule was run with, rising, and the PSNR of every prompt at each, (E, N)."""
    found: dict[int, Array] = {}
    for method in evaluation.plan.methods:
        if method.name.startswith(RULE) and method.reference == steps:
            speedup = float(method.name.removeprefix(RULE).split("x")[0])
            rows = [row for row in evaluation.rows if row["method"] == method.name and "prompt" in row]
            found[int(steps / speedup + 1e-9)] = np.array([row["psnr"] for row in rows])
    counts = sorted(found)
    return np.array(counts, float), np.stack([found[count] for count in counts])


def allocated(score: Array, mean: float) -> NDArray[np.int64]:
    """For every prompt the first line of ``score`` (G, N) that reaches one level, the highest with ``mean`` on average.

    Args:
        score: More is better; a line per number of evaluations, one more in each.
        mean: Of the lines' indices, at most.
    """
    best = np.zeros(score.shape[1], int)
    for level in np.sort(score.ravel()):
        reached = score >= level
        chosen = np.where(reached.any(0), reached.argmax(0), len(score) - 1)
        if chosen.mean() <= mean + 1e-9:
            best = chosen
    return best


def worst_tenth(decibels: Array) -> float:
    """Mean of the worst tenth."""
    return float(np.sort(decibels)[: max(1, -(-len(decibels) // 10))].mean())


def lines(evaluation: Evaluation, model: ErrorModel) -> list[dict[str, Any]]:
    """One line per number of evaluations that has others on both sides."""
    steps = model.steps
    known, decibels = measured(evaluation, steps)
    grid = np.arange(int(known[0]), int(known[-1]) + 1)
    # a run of more evaluations can end farther off by luck; an oracle would not take it
    rising = np.maximum.accumulate(decibels, 0)
    curves = np.stack([np.interp(grid, known, column) for column in rising.T], 1)
    schedules = [schedule_of(steps, int(count), WARP["plain"]) for count in grid]
    cut = round(SEEN * steps)
    whole = np.stack([-np.log(model.error(schedule) + model.floor) for schedule in schedules])
    begun = [[*schedule[:cut], *[1] * (steps - cut)] for schedule in schedules]
    third = np.stack([-np.log(model.error(schedule) + model.floor) for schedule in begun])
    found = []
    for count, real in list(zip(known, decibels))[1:-1]:
        at = int(count - grid[0])
        line: dict[str, Any] = {"evaluations": int(count), "steps": steps, "prompts": decibels.shape[1]}
        for name, score in (("fixed", None), ("oracle", curves), ("whole", whole), ("third", third)):
            chosen = np.full(len(real), at) if score is None else allocated(score, at)
            given = curves[chosen, np.arange(len(real))]
            line[name] = {"psnr": float(given.mean()), "worst": worst_tenth(given), "mean": float(grid[chosen].mean())}
        line["correlation"] = float(spearmanr(whole[at], real).statistic)
        line["own placement"] = own_placement(model, int(count))
        found.append(line)
    return found


def own_placement(model: ErrorModel, evaluations: int) -> float:
    """dB to first order, mean over the prompts, that a placement searched for one wins over one for the others."""
    prompts = model.full.shape[1]
    won = []
    for fold in range(FOLDS):
        held = np.arange(prompts) % FOLDS == fold
        shared = find_evaluations(of_prompts(model, ~held), evaluations)
        for prompt in np.flatnonzero(held):
            alone = of_prompts(model, np.arange(prompts) == prompt)
            won.append(alone.loss(shared) - alone.loss(find_evaluations(alone, evaluations)))
    return float(10 / np.log(10) * np.mean(won))


def of_prompts(model: ErrorModel, chosen: NDArray[np.bool_]) -> ErrorModel:
    """The measurements along some of the runs."""
    held = (model.sigmas, model.full[:, chosen], {}, {}, model.sensitivity, model.transformers, model.floor[chosen])
    return ErrorModel(*held)


def main() -> None:
    source, schedule, runs, target = sys.argv[1:]
    evaluation = Evaluation.read(Path(source))
    steps = next(method.steps for method in evaluation.plan.methods if method.kind == "base")
    if not Path(runs).exists():
        record(evaluation, steps, Path(runs))
    model = read(Path(runs), FittedSchedule.load(schedule).sensitivity)
    Path(target).write_text(json.dumps(lines(evaluation, model), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
