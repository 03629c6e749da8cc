"""Where a run of fewer model evaluations makes them: denser at high noise, and how the other steps follow.

Read the scheduler's own curve of noise levels as σ(u), u from 0 (noise) to 1 (clean), its n steps lying at u = i/n. The
j-th of m evaluations lies at u = (j/m)^w. With w = 1 it would be the curve of m steps; an error made early comes out
many times larger, so w > 1 pays. Nothing is measured on the model.

Where another transformer takes over below a noise level, as in Wan 2.2, it has no predictions to go on from: its first
two steps are evaluations, among those that the run makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from ..multiples import SKIP

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
def evaluation_steps(steps: int, evaluations: int, warp: float, takeovers: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The steps of a run of ``steps`` that make the evaluations: the nearest to where they lie, no step twice.

    Args:
        steps: n.
        evaluations: m, 1 to n.
        warp: w.
        takeovers: Steps at which another transformer takes over; see :func:`takeovers_of`. It and the step after it
            are evaluations, in place of the nearest one and of the next. Where m is too small for that there are more.
    """
    chosen: list[int] = []
    for j, u in enumerate(place_evaluations(evaluations, warp)):
        least, most = (chosen[-1] + 1 if chosen else 0), steps - evaluations + j
        chosen.append(min(max(round(steps * u), least), most))
    fixed = {0}
    for takeover in takeovers:
        for step in (takeover, takeover + 1):
            if step < steps and step not in chosen:
                free = [at for at in chosen if at not in fixed]
                # behind a take-over the next evaluation: with noise levels of their own it cannot change sides
                later = [at for at in free if at > step and step > takeover]
                if free:
                    chosen.remove(min(later or free, key=lambda at: abs(at - step)))
                chosen = sorted([*chosen, step])
            fixed.add(step)
    return tuple(chosen)


def takeovers_of(sigmas: Sequence[float], boundaries: Sequence[float]) -> tuple[int, ...]:
    """The steps at which another transformer takes over.

    Args:
        sigmas: Noise levels of the steps, falling.
        boundaries: Noise levels below which it does.
    """
    crossed = (i for level in boundaries for i, (high, low) in enumerate(pairwise(sigmas), 1) if low < level <= high)
    return tuple(sorted(set(crossed)))


def schedule_of(steps: int, evaluations: int, warp: float, takeovers: tuple[int, ...] = ()) -> list[int]:
    """A schedule of full and skipped steps; see :func:`evaluation_steps`."""
    full = set(evaluation_steps(steps, evaluations, warp, takeovers))
    return [1 if index in full else SKIP for index in range(steps)]


def moved_levels(
    sigmas: Sequence[float], evaluations: int, warp: float, boundaries: Sequence[float] = ()
) -> list[float]:
    """Noise levels of the same number of steps, whose evaluations lie exactly at u = (j/m)^w of the curve.

    Args:
        sigmas: The scheduler's n + 1 noise levels, falling; levels that occur twice in a row count once.
        evaluations: m.
        warp: w.
        boundaries: Noise levels below which another transformer takes over.
    """
    levels = levels_of_evaluations(sigmas, evaluations, warp, boundaries)
    at = steps_of_levels(len(sigmas) - 1, levels, warp, boundaries)
    return levels_of_steps(len(sigmas) - 1, at, levels, sigmas[-1], boundaries)


def levels_of_evaluations(
    sigmas: Sequence[float], evaluations: int, warp: float, boundaries: Sequence[float] = ()
) -> list[float]:
    """Noise levels of the m evaluations alone, falling; arguments as for :func:`moved_levels`."""
    curve = [s for i, s in enumerate(sigmas) if i == 0 or s != sigmas[i - 1]]
    levels = [level_at(curve, u * (len(curve) - 1)) for u in place_evaluations(evaluations, warp)]
    for boundary in boundaries:
        # a transformer that would make less than two evaluations makes the last two, in thirds of its way
        if sum(level < boundary for level in levels) < 2 <= evaluations and curve[-1] < boundary <= curve[0]:
            levels[-2:] = [boundary + (curve[-1] - boundary) * third / 3 for third in (1, 2)]
    return levels


def steps_of_levels(steps: int, levels: Sequence[float], warp: float, boundaries: Sequence[float]) -> tuple[int, ...]:
    """:func:`evaluation_steps` for evaluations at noise levels of their own.

    Args:
        steps: n.
        levels: Of the m evaluations, falling.
        warp: w.
        boundaries: Noise levels below which another transformer takes over.
    """
    at = evaluation_steps(steps, len(levels), warp)
    takeovers = tuple(at[j] for j in takeovers_of(levels, boundaries))
    return evaluation_steps(steps, len(levels), warp, takeovers)


def levels_of_steps(
    steps: int, at: Sequence[int], levels: Sequence[float], last: float, boundaries: Sequence[float] = ()
) -> list[float]:
    """Noise levels of all steps from those of the evaluations; skipped steps divide the way between two evenly in σ.

    Where another transformer takes over between two evaluations, the skipped steps lie on the side of the first.

    Args:
        steps: n.
        at: The m steps that make an evaluation, rising from 0.
        levels: Their noise levels, falling.
        last: Noise level after the last step.
        boundaries: Noise levels below which another transformer takes over.

    Returns:
        n + 1 noise levels.
    """
    ends = zip([*at[1:], steps], [*levels[1:], last])
    moved: list[float] = []
    for begin, high, (end, low) in zip(at, levels, ends):
        low = max([level for level in boundaries if low < level <= high], default=low)
        moved += [high + (low - high) * i / (end - begin) for i in range(end - begin)]
    return [*moved, last]


def level_at(curve: Sequence[float], place: float) -> float:
    """The line through ``curve`` at a fractional index, from 0 to its last."""
    index = min(int(place), len(curve) - 2)
    return curve[index] + (place - index) * (curve[index + 1] - curve[index])
