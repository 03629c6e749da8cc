"""What weighing predictions otherwise could win: all weights of a run fitted at once, and tried on other prompts.

    python benchmarks/joint_weights.py FILE [--evaluations 12] [--reference converged] [--prompts 24] [--others 16]

A run of m evaluations is the noise plus a sum of its predictions, each times a weight: the latent of evaluation i has i
of them. Which weights our solver takes is read off it. From there, Gauss-Newton: how the last latent answers to every
weight, and to the noise level of every evaluation, is measured by runs of the demo model, guidance 3; least squares
over the prompts of the fit, each counted by the inverse of its error, as a mean of dB counts it, gives the change. Runs
by the changed weights, of the same prompts, choose among dampings; runs of other prompts say what it was worth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.stats import wilcoxon
from tqdm import tqdm

from ddit_rt.evaluate import noise_seed
from ddit_rt.evaluate.prompts import own_prompts
from ddit_rt.evaluate.summary import worst_tenth
from ddit_rt.pipeline import DEMO, call_defaults, load_any
from ddit_rt.schedule import (
    WARP,
    FlowSolver,
    Ran,
    evaluation_steps,
    moved_levels,
)
from ddit_rt.trajectories import psnr

STEPS, GUIDANCE = 50, 3.0
EVALUATED = 64
"""Captions that evaluations take; those used here come after them."""
NEAR_THE_LIMIT = 80
"""Evaluations of a run that stands for the converged picture."""
DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Of Levenberg and Marquardt, on the diagonal of the normal equations."""
NUDGE = 0.02
"""How much a weight or a level is changed to see what answers, of the way between two evaluations."""


@dataclass(frozen=True)
class Weights:
    """A run of m evaluations.

    Attributes:
        levels: float64 (m,), noise level of each, falling.
        table: float64 (m, m), lower triangle: row i has what makes up the latent after evaluation i.
    """

    levels: torch.Tensor
    table: torch.Tensor

    @property
    def evaluations(self) -> int:
        return len(self.levels)

    def latent(self, noise: torch.Tensor, predictions: Sequence[torch.Tensor], after: int) -> torch.Tensor:
        """The latent after evaluation ``after``, from those up to it; after -1 it is the noise."""
        return noise + sum(float(self.table[after, j]) * predictions[j] for j in range(after + 1))


class DemoModel:
    """The demo model's flow for several prompts at once.

    Args:
        prompts: Captions.
        seed: Of the first one's noise.

    Attributes:
        noise: (N, tokens, channels).
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], seed: int) -> None:
        call = call_defaults(DEMO)
        self._pipe, self._size = pipe, (call["height"], call["width"])
        texts = [prompts, [""] * len(prompts)]
        self._texts = [
            pipe.encode_prompt(
                prompt=text, prompt_2=text, max_sequence_length=call["max_sequence_length"], device="cpu"
            )
            for text in texts
        ]
        channels = pipe.transformer.config.in_channels // 4
        drawn = [
            pipe.prepare_latents(
                1, channels, *self._size, torch.float32, "cpu", torch.Generator().manual_seed(noise_seed(seed, i))
            )
            for i in range(len(prompts))
        ]
        self.noise, self._places = torch.cat([latent for latent, _ in drawn]), drawn[0][1]

    @torch.no_grad()
    def velocity(self, latent: torch.Tensor, level: float) -> torch.Tensor:
        """The guided prediction, (N, tokens, channels)."""
        told = torch.full((len(latent),), level)
        with_prompt, without = (
            self._pipe.transformer(
                hidden_states=latent,
                timestep=told,
                guidance=torch.zeros_like(told) if self._pipe.transformer.config.guidance_embeds else None,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=places,
                img_ids=self._places,
                return_dict=False,
            )[0]
            for embeds, pooled, places in self._texts
        )
        return without + GUIDANCE * (with_prompt - without)

    @torch.no_grad()
    def pictures(self, latent: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1], rounded to 8 bits."""
        vae = self._pipe.vae
        maps = self._pipe._unpack_latents(latent, *self._size, self._pipe.vae_scale_factor)
        maps = maps / vae.config.scaling_factor + vae.config.shift_factor
        decoded = torch.cat([vae.decode(one[None], return_dict=False)[0] for one in maps])
        return (decoded / 2 + 0.5).clamp(0, 1).mul(255).round() / 255


def by_solver(
    latent: torch.Tensor,
    sigmas: Sequence[float],
    evaluations: int,
    reference: str,
    predict: Callable[[torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """The rule's run by :class:`FlowSolver`, from a latent to the last one."""
    converged = reference == "converged"
    levels = moved_levels(sigmas, evaluations, WARP[reference]) if converged else list(sigmas)
    full = evaluation_steps(len(levels) - 1, evaluations, WARP[reference])
    solver = FlowSolver(FlowMatchEulerDiscreteScheduler(), levels, float(converged))
    output = torch.zeros_like(latent)
    for index, (high, low) in enumerate(pairwise(levels)):
        if index in full:
            output = predict(latent, high)
        move = (low - high) * output
        ran = Ran.FULL if index in full else Ran.SKIPPED
        latent = solver.step(index, ran, "model", output, latent, partial(_moved, by=move))[0][0]
    return latent


def _moved(latent: torch.Tensor, by: torch.Tensor) -> tuple[tuple[torch.Tensor], torch.Tensor]:
    """A scheduler's result and its increment."""
    return (latent + by,), by


def of_solver(sigmas: Sequence[float], evaluations: int, reference: str) -> Weights:
    """The rule's run as weights: what the solver makes of predictions that are told apart by where their 1 stands."""
    seen: list[tuple[float, torch.Tensor]] = []

    def predict(latent: torch.Tensor, level: float) -> torch.Tensor:
        # what the model sees: the gap behind it is not corrected yet
        seen.append((level, latent))
        return torch.eye(evaluations)[len(seen) - 1][None]

    last = by_solver(torch.zeros(1, evaluations), sigmas, evaluations, reference, predict)
    levels = torch.tensor([level for level, _ in seen], dtype=torch.float64)
    return Weights(levels, torch.cat([*(latent for _, latent in seen[1:]), last]).double())


def run(model: Any, weights: Weights, known: Sequence[torch.Tensor] = ()) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Predictions and last latent of a run.

    Args:
        model: A :class:`DemoModel`, or what has its ``noise`` and ``velocity``.
        weights: Of it.
        known: Predictions of its first evaluations, which are not made again.
    """
    predictions = list(known)
    for made in range(len(predictions), weights.evaluations):
        latent = weights.latent(model.noise, predictions, made - 1)
        predictions.append(model.velocity(latent, float(weights.levels[made])))
    return predictions, weights.latent(model.noise, predictions, weights.evaluations - 1)


@dataclass(frozen=True)
class Change:
    """One number of a run: the weight of prediction ``of`` in the way after evaluation ``after``, or, without it, the
    noise level of that evaluation."""

    after: int
    of: int | None = None

    def applied(self, weights: Weights, size: float) -> Weights:
        """The weights with it changed; what is added to a way stays in all later latents."""
        if self.of is None:
            levels = weights.levels.clone()
            levels[self.after] += size
            return replace(weights, levels=levels)
        table = weights.table.clone()
        table[self.after :, self.of] += size
        return replace(weights, table=table)


def changes_of(evaluations: int, levels: bool) -> list[Change]:
    """All weights, and the noise levels but for the first."""
    found = [Change(i, j) for i in range(evaluations) for j in range(i + 1)]
    return found + [Change(i) for i in range(1, evaluations) if levels]


def answers(
    model: Any, weights: Weights, changes: Sequence[Change], progress: Callable[[Any], Any] = lambda items: items
) -> torch.Tensor:
    """How the last latent answers to each change, (changes, N, ...), per unit."""
    predictions, last = run(model, weights)
    ways = torch.cat([weights.levels[:-1] - weights.levels[1:], weights.levels[-1:]])
    found = []
    for change in progress(changes):
        size = NUDGE * float(ways[change.after])
        # a level changes its own evaluation, a weight those after it
        known = predictions[: change.after + (change.of is not None)]
        found.append((run(model, change.applied(weights, size), known)[1] - last) / size)
    return torch.stack(found)


def solved(jacobian: torch.Tensor, missed: torch.Tensor, damping: float) -> torch.Tensor:
    """The damped least-squares change, float64 (changes,); every prompt counts by the inverse of its own error.

    Args:
        jacobian: (changes, N, ...), of :func:`answers`.
        missed: (N, ...), the last latent less the one to reach.
        damping: Of the normal equations' diagonal.
    """
    scale = missed.double().flatten(1).square().mean(1).rsqrt()
    columns = (jacobian.double().flatten(2) * scale[None, :, None]).flatten(1)
    wanted = (missed.double().flatten(1) * scale[:, None]).flatten()
    normal = columns @ columns.T
    return -torch.linalg.solve(normal + damping * normal.diagonal().diag(), columns @ wanted)


def changed(weights: Weights, changes: Sequence[Change], sizes: torch.Tensor) -> Weights | None:
    """With all the changes; None where noise levels would cross."""
    for change, size in zip(changes, sizes.tolist()):
        weights = change.applied(weights, size)
    falling = bool((weights.levels[:-1] > weights.levels[1:]).all()) and float(weights.levels[-1]) > 0
    return weights if falling else None


def target_of(model: DemoModel, sigmas: Sequence[float], reference: str) -> torch.Tensor:
    """The last latent to reach, (N, tokens, channels)."""
    evaluations = NEAR_THE_LIMIT if reference == "converged" else len(sigmas) - 1
    return run(model, of_solver(sigmas, evaluations, reference))[1]


def decibels(model: DemoModel, last: torch.Tensor, target: torch.Tensor) -> list[float]:
    """PSNR of every picture."""
    return [psnr(one, other) for one, other in zip(model.pictures(last), model.pictures(target))]


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as ``benchmarks/target_tables.py`` reads it."""
    pipe = load_any(DEMO, None, "cpu")
    scheduler = pipe.scheduler
    seen: list[float] = []

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[:] = scheduler.sigmas.tolist()
        pipe._interrupt = True
        return tensors

    call = {**call_defaults(DEMO), "num_inference_steps": STEPS, "output_type": "latent"}
    pipe(prompt="a", callback_on_step_end=stop, **call)
    captions = own_prompts(DEMO, EVALUATED + options.prompts + options.others)[EVALUATED:]
    fitted, others = DemoModel(pipe, captions[: options.prompts], 1), DemoModel(pipe, captions[options.prompts :], 2)
    targets = [target_of(model, seen, options.reference) for model in (fitted, others)]
    weights = of_solver(seen, options.evaluations, options.reference)
    before = [run(model, weights)[1] for model in (fitted, others)]
    plain = [decibels(model, last, target) for model, last, target in zip((fitted, others), before, targets)]
    changes = changes_of(options.evaluations, levels=options.reference == "converged")
    jacobian = answers(fitted, weights, changes, lambda items: tqdm(items, unit="run"))
    rows = [{"which": "the solver's own", "numbers": 0, **_row(plain, plain)}]
    for which, chosen in subsets(changes).items():
        best = None
        part = [changes[i] for i in chosen]
        for damping in DAMPINGS:
            new = changed(weights, part, solved(jacobian[chosen], before[0] - targets[0], damping))
            if new is None:
                continue
            found = decibels(fitted, run(fitted, new)[1], targets[0])
            if best is None or sum(found) > sum(best[0]):
                best = found, new, damping
        assert best is not None
        ended = [best[0], decibels(others, run(others, best[1])[1], targets[1])]
        rows.append({"which": which, "numbers": len(part), "damping": best[2], **_row(ended, plain)})
        print(json.dumps(rows[-1]), flush=True)
    return {
        "evaluations": options.evaluations,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "reference": options.reference,
        "prompts": options.prompts,
        "others": options.others,
        "rows": rows,
    }


def subsets(changes: Sequence[Change]) -> dict[str, list[int]]:
    """What is fitted -> which of the changes."""
    newest = [i for i, one in enumerate(changes) if one.of is not None and one.of > one.after - 2]
    every = [i for i, one in enumerate(changes) if one.of is not None]
    found = {"weights of the two newest predictions": newest, "weights of all predictions": every}
    if len(every) < len(changes):
        found["all weights, and the noise levels"] = list(range(len(changes)))
    return found


def _row(ended: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and worst tenth on the prompts of the fit and on the others, and how the latter gained."""
    gains = [new - old for new, old in zip(ended[1], before[1])]
    row: dict[str, Any] = {
        name: {"psnr": round(sum(values) / len(values), 3), "worst": round(worst_tenth(values), 3)}
        for name, values in zip(("fit", "others"), ended)
    }
    if any(gains):
        row |= {"better": sum(gain > 0 for gain in gains), "p": float(f"{wilcoxon(gains).pvalue:.3g}")}
    return row


def main() -> None:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="where the result goes (.json)")
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--reference", choices=sorted(WARP), default="converged")
    parser.add_argument("--prompts", type=int, default=24, help="that are fitted to")
    parser.add_argument("--others", type=int, default=16, help="that the fit is tried on")
    options = parser.parse_args()
    result = measured(options)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
