"""The schedule that ends nearest to the plain run, among those that cost no more than wanted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ..errors import OutOfReachError
from ..multiples import SKIP
from ..schedule import check_speedup, schedule_of
from .error_model import ErrorModel

_SWEEPS = 6
_WARPS = (1.0, 1.3, 1.6, 1.9, 2.2)
"""Of the schedules that a search for evaluations begins with; see :mod:`ddit_rt.schedule.placement`."""
_SHIFTS = (-3, -2, -1, 1, 2, 3)


def find_schedule(error_model: ErrorModel, speedup: float, kinds: Sequence[int] = (1, 2, 4, SKIP)) -> list[int]:
    """Takes work away where it is missed least, then exchanges steps while that helps.

    Args:
        error_model: Measurements of the model.
        speedup: Wanted ratio of FLOP, > 1.
        kinds: Multiples that steps may run at, 0 for no model call.

    Raises:
        ConfigError: ``speedup`` <= 1.
        OutOfReachError: no schedule of these kinds is that fast.
    """
    check_speedup(speedup)
    budget = error_model.steps / speedup + 1e-6
    movable = [t for t in range(error_model.steps) if not error_model.must_be_full(t)]
    schedule = [1] * error_model.steps
    _check_reach(error_model, budget, movable, kinds)
    while error_model.cost(schedule) > budget:
        schedule = _cheaper(error_model, schedule, movable, kinds)
    return _improved(error_model, schedule, movable, kinds, budget)


def find_evaluations(error_model: ErrorModel, evaluations: int) -> list[int]:
    """Which steps to make full where all others are skipped.

    It begins with the best of the rules that need no measurement, and moves one evaluation at a time while that helps.

    Args:
        error_model: Measurements of the model.
        evaluations: How many, at least 2.

    Raises:
        OutOfReachError: there are fewer steps, or too few evaluations to draw a line through.
    """
    steps = error_model.steps
    first = [0, *error_model.takeovers]
    least = fewest_evaluations(error_model)
    if not least <= evaluations <= steps:
        raise OutOfReachError(
            f"{evaluations} evaluations in {steps} steps: a schedule makes {least} to {steps} of them."
        )
    begun = (schedule_of(steps, evaluations, warp) for warp in _WARPS)
    schedule = min((_with_first(s, first) for s in begun), key=error_model.loss)
    loss = error_model.loss(schedule)
    for _ in range(4 * _SWEEPS):
        before = loss
        for t in [t for t in range(steps) if schedule[t] == 1 and t not in first]:
            for place in (t + shift for shift in _SHIFTS):
                if not 0 < place < steps or schedule[place] == 1:
                    continue
                candidate = _changed(_changed(schedule, t, SKIP), place, 1)
                found = error_model.loss(candidate)
                if found < loss - 1e-6:
                    schedule, loss = candidate, found
                    break
        if loss > before - 1e-4:
            break
    return schedule


def fewest_evaluations(error_model: ErrorModel) -> int:
    """Full steps that every schedule has: those that lines begin from."""
    return sum(error_model.must_be_full(t) for t in range(error_model.steps))


def _with_first(schedule: list[int], first: Sequence[int]) -> list[int]:
    """The schedule with a transformer's first step full, in place of the evaluation nearest to it."""
    for t in first:
        if schedule[t] == SKIP:
            nearest = min((i for i, k in enumerate(schedule) if k == 1 and i not in first), key=lambda i: abs(i - t))
            schedule = _changed(_changed(schedule, nearest, SKIP), t, 1)
    return schedule


def _check_reach(error_model: ErrorModel, budget: float, movable: Sequence[int], kinds: Sequence[int]) -> None:
    least = error_model.steps * 1.0
    for kind in kinds:
        schedule = [1] * error_model.steps
        for t in movable:
            schedule[t] = kind
        least = min(least, error_model.cost(schedule))
    if least > budget:
        raise OutOfReachError(
            f"speedup={error_model.steps / budget:.3g}: steps of the kinds {', '.join(map(str, kinds))} reach "
            f"{error_model.steps / least:.2f} at most here. Ask for less, or allow steps without a model call (0)."
        )


def _changed(schedule: list[int], t: int, kind: int) -> list[int]:
    return [*schedule[:t], kind, *schedule[t + 1 :]]


def _cheaper(error_model: ErrorModel, schedule: list[int], movable: Sequence[int], kinds: Sequence[int]) -> list[int]:
    """The one change that loses least per FLOP saved; probes, which later coarse steps share, are left out of it."""
    shares = {1: 1.0, SKIP: 0.0, **error_model.shares}
    loss = error_model.loss(schedule)
    best: tuple[float, list[int]] | None = None
    for t in movable:
        for kind in kinds:
            saved = shares[schedule[t]] - shares[kind]
            if saved <= 0:
                continue
            trial = _changed(schedule, t, kind)
            lost = error_model.loss(trial) - loss
            # a change that even gains is taken for its gain
            price = lost / saved if lost > 0 else lost
            if best is None or price < best[0]:
                best = price, trial
    assert best is not None  # _check_reach: with every step at its cheapest the budget is kept
    return best[1]


def _improved(
    error_model: ErrorModel, schedule: list[int], movable: Sequence[int], kinds: Sequence[int], budget: float
) -> list[int]:
    loss = error_model.loss(schedule)
    for _ in range(_SWEEPS):
        before = loss
        trials = [lambda s, t=t, kind=kind: _changed(s, t, kind) for t in movable for kind in kinds]
        trials += [lambda s, a=a, b=b: _changed(_changed(s, a, s[b]), b, s[a]) for a, b in combinations(movable, 2)]
        for trial in trials:
            candidate = trial(schedule)
            if candidate == schedule or error_model.cost(candidate) > budget:
                continue
            found = error_model.loss(candidate)
            if found < loss - 1e-9:
                schedule, loss = candidate, found
        if loss > before - 1e-4:
            break
    return schedule
