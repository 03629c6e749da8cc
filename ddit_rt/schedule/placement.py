"""Where a run of fewer model evaluations makes them: denser at high noise, and how the other steps follow.

Read the scheduler's own curve of noise levels as σ(u), u from 0 (noise) to 1 (clean), its n steps lying at u = i/n. The
j-th of m evaluations lies at u = (j/m)^w. With w = 1 it would be the curve of m steps; an error made early comes out
many times larger, so w > 1 pays. Nothing is measured on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..config import SKIP

WARP = {"plain": 1.65, "converged": 1.65}
"""w, by what a run aims at: chosen for each, and found alike; docs/targets.md has what it gives."""


def place_evaluations(evaluations: int, warp: float) -> list[float]:
    """u of each evaluation, in [0, 1), rising from 0.

    Args:
        evaluations: m, at least 1.
        warp: w, above 0.
    """
    return [(j / evaluations) ** warp for j in range(evaluations)]


@lru_cache(maxsize=64)
def evaluation_steps(steps: int, evaluations: int, warp: float) -> tuple[int, ...]:
    """The steps of a run of ``steps`` that make the evaluations: the nearest to where they lie, no step twice.

    Args:
        steps: n.
        evaluations: m, 1 to n.
        warp: w.
    """
    chosen: list[int] = []
    for j, u in enumerate(place_evaluations(evaluations, warp)):
        least, most = (chosen[-1] + 1 if chosen else 0), steps - evaluations + j
        chosen.append(min(max(round(steps * u), least), most))
    return tuple(chosen)


def schedule_of(steps: int, evaluations: int, warp: float) -> list[int]:
    """A schedule of full and skipped steps; see :func:`evaluation_steps`."""
    full = set(evaluation_steps(steps, evaluations, warp))
    return [1 if index in full else SKIP for index in range(steps)]


def moved_levels(sigmas: Sequence[float], evaluations: int, warp: float) -> list[float]:
    """Noise levels of the same number of steps, whose evaluations lie exactly at u = (j/m)^w of the curve.

    Args:
        sigmas: The scheduler's n + 1 noise levels, falling; levels that occur twice in a row count once.
        evaluations: m.
        warp: w.
    """
    curve = [s for i, s in enumerate(sigmas) if i == 0 or s != sigmas[i - 1]]
    levels = [level_at(curve, u * (len(curve) - 1)) for u in place_evaluations(evaluations, warp)]
    return levels_of_steps(len(sigmas) - 1, evaluation_steps(len(sigmas) - 1, evaluations, warp), levels, curve[-1])


def levels_of_steps(steps: int, at: Sequence[int], levels: Sequence[float], last: float) -> list[float]:
    """Noise levels of all steps from those of the evaluations; skipped steps divide the way between two evenly in σ.

    Args:
        steps: n.
        at: The m steps that make an evaluation, rising from 0.
        levels: Their noise levels, falling.
        last: Noise level after the last step.

    Returns:
        n + 1 noise levels.
    """
    ends = zip([*at[1:], steps], [*levels[1:], last])
    moved: list[float] = []
    for begin, high, (end, low) in zip(at, levels, ends):
        moved += [high + (low - high) * i / (end - begin) for i in range(end - begin)]
    return [*moved, last]


def level_at(curve: Sequence[float], place: float) -> float:
    """The line through ``curve`` at a fractional index, from 0 to its last."""
    index = min(int(place), len(curve) - 2)
    return curve[index] + (place - index) * (curve[index + 1] - curve[index])
