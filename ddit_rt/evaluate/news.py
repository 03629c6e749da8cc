"""What coarse runs tell that earlier steps do not: the best linear combination with them against the best without.

A coarse step is worth its cost only where the model, run on fewer tokens, knows something of the full model's
prediction that the predictions before it do not. That is asked along plain runs, of the low band, which is all that a
coarse run gives. Weights are found on half of the prompts, for every sixth of the run, and judged on the other half;
and the other way round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..granularity import bands, line
from ..trajectories import Trajectory, coarse_predictions, record_trajectory

_PARTS = 6
"""Of a run, each with weights of its own: with more of them they fit a few prompts' chances."""

_DAMPING = 1e-6
"""Of the least squares, relative to the features' mean square: two that are the same may share a coefficient."""


@dataclass(frozen=True)
class CoarseNews:
    """What is missed of the low band of full predictions, a distance after the last full step.

    Steps before it were full at the same distance. The root mean squares are over steps, pixels and prompts, in units
    of what a straight line through the last two predictions misses.

    Attributes:
        multiple: Of the patch size.
        distance: Steps since the last full one.
        steps: At how many steps this was asked.
        runs: Prompts.
        tokens: Of the coarse grid.
        cost: FLOP of a coarse step over those of a full one.
        unchanged: The last prediction as it was.
        earlier: The best combination of the last three predictions.
        with_coarse: The best combination of these, the coarse run and the coarse run at the last full step.
        delta: The last prediction, and what changed in the coarse run since: ``coarse="delta"``.
    """

    multiple: int
    distance: int
    steps: int
    runs: int
    tokens: int
    cost: float
    unchanged: float
    earlier: float
    with_coarse: float
    delta: float

    @property
    def news(self) -> float:
        """Share of the mean square that earlier predictions leave which the coarse runs explain."""
        return 1 - (self.with_coarse / self.earlier) ** 2


def coarse_news(
    pipe: Any,
    prompts: Sequence[str],
    multiples: Sequence[int],
    distances: Sequence[int],
    call: Mapping[str, Any],
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[CoarseNews]:
    """What coarse runs tell of full predictions, beyond the predictions before.

    Args:
        pipe: A supported pipeline; left plain.
        prompts: One plain run each, two at least.
        multiples: Of the patch size, above 1.
        distances: In steps.
        call: Arguments of the pipeline, without a prompt.
        seed: Of the first prompt's noise; the i-th takes seed + i.
        progress: Called with a line of text before every run.

    Returns:
        A line for every multiple and distance.

    Raises:
        ConfigError: fewer than two prompts, a distance below 1 or too long for the run, or a multiple that cannot be
            run here.
        UnsupportedPipelineError: the pipeline, or this way to call it, cannot run coarsely.
    """
    if len(prompts) < 2:
        raise ConfigError(f"{len(prompts)} prompt: give two at least; what one half tells is tried on the other.")
    for distance in distances:
        if distance < 1:
            raise ConfigError(f"distances={list(distances)}: {distance} is below 1.")
    means: dict[int, list[_Bands]] = {k: [] for k in multiples}
    shares: dict[int, float] = {}
    for i, prompt in enumerate(prompts):
        progress(f"plain: {prompt}")
        trajectory = record_trajectory(pipe, seed + i, prompt=prompt, **call)
        asked = {distance: _places(trajectory, distance) for distance in distances}
        geometry = trajectory.inputs.geometry
        for k in multiples:
            progress(f"{k}p along it: {prompt}")
            coarse, shares[k] = coarse_predictions(
                pipe, trajectory, k, partial(bands.means, geometry=geometry, multiple=k)
            )
            full = [bands.means(trajectory.canonical(output), geometry, k) for output in trajectory.outputs]
            means[k].append(_Bands(torch.stack(full).double(), torch.stack(coarse).double()))
    found = []
    for k in multiples:
        for distance, steps in asked.items():
            squares = _squares(means[k], trajectory.sigmas.tolist(), steps, distance)
            unit = squares.pop("line")
            shown = {name: math.sqrt(value / unit) for name, value in squares.items()}
            found.append(CoarseNews(k, distance, len(steps), len(prompts), geometry.tokens(k), shares[k], **shown))
    return found


@dataclass(frozen=True)
class _Bands:
    """Means over patches of one run's predictions, the full and the coarse ones: float64 (S, B, C, F, H, W)."""

    full: torch.Tensor
    coarse: torch.Tensor


def _places(trajectory: Trajectory, distance: int) -> list[int]:
    """Steps with three full steps before them at this distance, all of one transformer.

    Raises:
        ConfigError: there are none.
    """
    made_by, steps = trajectory.transformers, trajectory.steps
    found = [t for t in range(3 * distance, steps) if made_by[t] == made_by[t - 3 * distance]]
    if not found:
        most = max(made_by.count(place) for place in set(made_by)) - 1
        raise ConfigError(f"distance {distance}: too far apart in {steps} steps, which take {most // 3} at most.")
    return found


def _squares(runs: Sequence[_Bands], sigmas: Sequence[float], steps: Sequence[int], distance: int) -> dict[str, float]:
    """Sums of squares of what every guess misses, over steps and runs."""
    total = dict.fromkeys(("line", "unchanged", "earlier", "with_coarse", "delta"), 0.0)
    length = math.ceil(len(steps) / _PARTS)
    for start in range(0, len(steps), length):
        part = steps[start : start + length]
        halves = [_Half.of(half, part, distance) for half in (runs[::2], runs[1::2])]
        for mine, other in (halves, halves[::-1]):
            for name, count in (("earlier", 2), ("with_coarse", 4)):
                total[name] += mine.missed(_least_squares(other.known[:, :count], other.change))
        for run in runs:
            for t in part:
                last, before = t - distance, t - 2 * distance
                points = [(sigmas[i], run.full[i]) for i in (before, last)]
                guesses = {
                    "line": line(points[0], points[1], sigmas[t]),
                    "unchanged": run.full[last],
                    "delta": run.full[last] + run.coarse[t] - run.coarse[last],
                }
                for name, guess in guesses.items():
                    total[name] += float((guess - run.full[t]).square().sum())
    return total


@dataclass(frozen=True)
class _Half:
    """Of half of the prompts: by how much predictions change from the last full step on, and what is known of it.

    Attributes:
        change: float64 (N,).
        known: float64 (N, 4): the two changes before, and the coarse runs now and then, from the last prediction on.
    """

    change: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, runs: Sequence[_Bands], steps: Sequence[int], distance: int) -> _Half:
        change, known = [], []
        for run in runs:
            for t in steps:
                first, before, last = (t - back * distance for back in (3, 2, 1))
                features = [
                    run.full[last] - run.full[before],
                    run.full[before] - run.full[first],
                    run.coarse[t] - run.full[last],
                    run.coarse[last] - run.full[last],
                ]
                change.append((run.full[t] - run.full[last]).flatten())
                known.append(torch.stack([feature.flatten() for feature in features], 1))
        return cls(torch.cat(change), torch.cat(known))

    def missed(self, weights: torch.Tensor) -> float:
        """Sum of squares of what the first of the features, weighed so, miss of the change."""
        return float((self.known[:, : len(weights)] @ weights - self.change).square().sum())


def _least_squares(features: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Weights (n,) of features (N, n) for what is wanted (N,)."""
    square = features.T @ features
    damping = _DAMPING * torch.diagonal(square).mean().clamp_min(1e-30)
    return torch.linalg.solve(square + damping * torch.eye(len(square), dtype=square.dtype), features.T @ wanted)


def write_news(found: Sequence[CoarseNews], folder: Path) -> Path:
    """Writes ``coarse.json``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coarse.json"
    path.write_text(json.dumps([asdict(one) | {"news": one.news} for one in found], indent=1) + "\n", encoding="utf-8")
    return path
