"""What adapting to the prompt could win at equal mean FLOP, from finished runs and what a step shows of a prompt.

    python benchmarks/adapting.py EVALUATION SCHEDULE RUNS FILE

takes an evaluation of ``benchmarks/targets.json`` that :mod:`evaluations` condensed, and a fitted schedule of the same
number of steps or another, for its sensitivity. It records the plain run of every prompt once more, in the file RUNS
(.npz) if that is not there yet, and writes into FILE an answer to: had each
prompt its own number of evaluations by the rule, with the same mean, how near to plain would the worst tenth end, if
they were chosen by

- what each prompt's runs in fact came to at every number (an oracle),
- the errors of first order that forecasts make along the prompt's whole plain run, under one sensitivity for all,
- those that the first third of the run shows, when there is still something to choose,
- how much the prediction changes early in the run when the latent is moved a little the way that forecasts err, which
  takes one more evaluation; what that says of every prompt is learned from the others.

And what a placement of its own would win every prompt over one that was searched for the other prompts, to first order.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluations import Evaluation
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ddit_rt.evaluate import noise_seed
from ddit_rt.evaluate.summary import worst_tenth
from ddit_rt.fitting import ErrorModel, find_evaluations
from ddit_rt.pipeline import load_any
from ddit_rt.runtime import MethodPatch, installed
from ddit_rt.schedule import WARP, FittedSchedule, schedule_of
from ddit_rt.trajectories import Trajectory, denoise, record_trajectory

Array = NDArray[np.float64]

FOLDS = 4
"""Groups of prompts; a placement is searched on the others."""
SEEN = 1 / 3
"""Share of a run after which its number of evaluations is chosen."""
NUMBERS = 512
"""That a prediction is reduced to."""
PROBE_AT, PROBE_SIZE = 0.18, 0.02
"""Share of a run at which the latent is moved, and by how much, root mean square."""
RULE, FITTED = "target-", "fitted-"


def record(evaluation: Evaluation, steps: int, runs: Path) -> None:
    """Keeps the plain runs of the evaluation's prompts, from its first seed, every prediction as :data:`NUMBERS`."""
    plan = evaluation.plan
    pipe = load_any(plan.model, None, "cpu")
    pipe.set_progress_bar_config(disable=True)
    full, floor, responses = [], [], []
    for index, prompt in enumerate(plan.prompts):
        call = {**plan.call, "prompt": prompt, "num_inference_steps": steps}
        trajectory = record_trajectory(pipe, noise_seed(plan.seeds[0], index), **call)
        full.append(np.stack([sketch(output.numpy().ravel()) for output in trajectory.outputs]))
        floor.append(1e-6 * float(trajectory.latents[-1].float().square().mean()))
        responses.append(response(pipe, trajectory, round(PROBE_AT * steps)))
        print(f"{len(full)} of {len(plan.prompts)}: {prompt}", flush=True)
    sigmas, response_of = trajectory.sigmas.numpy(), np.array(responses)
    np.savez(runs, full=np.stack(full, 1), floor=np.array(floor), sigmas=sigmas, response=response_of)


def response(pipe: Any, trajectory: Trajectory, at: int) -> float:
    """How much the guided prediction of a step changes over how much the latent was moved, the way forecasts err."""
    sigmas, outputs, scale = trajectory.sigmas, trajectory.outputs, trajectory.arguments["true_cfg_scale"]
    share = (sigmas[at - 1] - sigmas[at - 2]) / (sigmas[at - 2] - sigmas[at - 4])
    erred = outputs[at - 1] - (outputs[at - 2] + share * (outputs[at - 2] - outputs[at - 4]))
    moved = erred / erred.square().mean().sqrt() * PROBE_SIZE
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(inner: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor, **more: Any) -> Any:
        nonlocal made
        made += 1
        return inner(output, timestep, sample, **more)

    made = 0

    def forward(inner: Any, **arguments: Any) -> Any:
        result = inner(**arguments)
        if made == at:
            again = inner(**{**arguments, "hidden_states": arguments["hidden_states"] + moved})
            seen.append((result[0], again[0]))
            if len(seen) == 2:
                raise _SeenError
        return result

    patches = [MethodPatch(pipe.transformer, "forward", forward), MethodPatch(pipe.scheduler, "step", step)]
    with installed(patches), suppress(_SeenError):
        denoise(pipe, trajectory.seed, trajectory.arguments)
    (positive, positive_moved), (negative, negative_moved) = seen
    first, second = positive_moved - positive, negative_moved - negative
    changed = second + scale * (first - second)
    return float((changed.square().mean() / moved.square().mean()).sqrt())


class _SeenError(Exception):
    """Ends a run that has shown what it was made for."""


def sketch(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of entries of random sign, which keep the mean square of all on average."""
    random = np.random.default_rng(0)
    share = values.size // NUMBERS
    mixed = (random.choice((-1, 1), values.size) * values)[random.permutation(values.size)][: share * NUMBERS]
    return (mixed.reshape(NUMBERS, share).sum(1) / np.sqrt(share)).astype(np.float32)


def read(runs: Path, sensitivity: list[float]) -> tuple[ErrorModel, Array]:
    """What was kept, with one sensitivity for all prompts, and the response of every prompt."""
    with np.load(runs) as kept:
        full, floor, sigmas, responses = (kept[name] for name in ("full", "floor", "sigmas", "response"))
    steps = len(full)
    places = np.linspace(0, 1, steps), np.linspace(0, 1, len(sensitivity))
    gains = np.exp(np.interp(*places, np.log(sensitivity)))
    return ErrorModel(sigmas, full, {}, {}, gains, (0,) * steps, floor), responses


def measured(evaluation: Evaluation, steps: int, name: str) -> dict[int, Array]:
    """Evaluations that methods with names of this beginning make -> the PSNR of every prompt, (N,)."""
    found: dict[int, Array] = {}
    for method in evaluation.plan.methods:
        asked = method.name.removeprefix(name).split("x@")[0]
        if method.name.startswith(name) and method.reference == steps and asked.replace(".", "").isdigit():
            rows = [row for row in evaluation.rows if row["method"] == method.name and "prompt" in row]
            found[int(steps / float(asked) + 1e-9)] = np.array([row["psnr"] for row in rows])
    return found


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


def learned(curves: Array, seen: Array) -> Array:
    """What the line through the other prompts' curves over what was seen of them says of each; (G, N) as ``curves``."""
    found = np.empty_like(curves)
    for prompt in range(curves.shape[1]):
        others = np.arange(curves.shape[1]) != prompt
        slopes, levels = np.polyfit(seen[others], curves[:, others].T, 1)
        found[:, prompt] = levels + slopes * seen[prompt]
    return np.maximum.accumulate(found, 0)


def lines(evaluation: Evaluation, model: ErrorModel, responses: Array) -> list[dict[str, Any]]:
    """One line per number of evaluations that has others on both sides."""
    steps = model.steps
    by_rule, fitted = (measured(evaluation, steps, name) for name in (RULE, FITTED))
    known = np.array(sorted(by_rule), float)
    decibels = np.stack([by_rule[count] for count in sorted(by_rule)])
    grid = np.arange(int(known[0]), int(known[-1]) + 1)
    # a run of more evaluations can end farther off by luck; an oracle would not take it
    rising = np.maximum.accumulate(decibels, 0)
    curves = np.stack([np.interp(grid, known, column) for column in rising.T], 1)
    schedules = [schedule_of(steps, int(count), WARP["plain"]) for count in grid]
    cut = round(SEEN * steps)
    whole = np.stack([-np.log(model.error(schedule) + model.floor) for schedule in schedules])
    begun = [[*schedule[:cut], *[1] * (steps - cut)] for schedule in schedules]
    third = np.stack([-np.log(model.error(schedule) + model.floor) for schedule in begun])
    probed = learned(curves, np.log(responses))
    found = []
    for count, real in list(zip(known, decibels))[1:-1]:
        at = int(count - grid[0])
        line: dict[str, Any] = {"evaluations": int(count), "steps": steps, "prompts": decibels.shape[1]}
        scores = {"fixed": None, "oracle": curves, "whole": whole, "third": third, "probed": probed}
        for name, score in scores.items():
            left = at - 1 if name == "probed" else at  # the probe is an evaluation too
            chosen = np.full(len(real), at) if score is None else allocated(score, left)
            given = curves[chosen, np.arange(len(real))]
            line[name] = {
                "psnr": float(given.mean()),
                "worst": worst_tenth(given.tolist()),
                "mean": float(grid[chosen].mean()),
            }
        if count in fitted:
            line["fitted"] = {"psnr": float(fitted[count].mean()), "worst": worst_tenth(fitted[count].tolist())}
        line["correlation"] = float(spearmanr(whole[at], real).statistic)
        line["probe correlation"] = float(spearmanr(responses, real).statistic)
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
    found = lines(evaluation, *read(Path(runs), FittedSchedule.load(schedule).sensitivity))
    Path(target).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
