"""Schedules with full steps at fixed spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence


def initial_steps(steps: int) -> int:
    """Full steps at the beginning of a run, as the policy's default ``initial_full_steps`` and ``order`` leave them."""
    return max(3, math.ceil(steps / 8))


def pattern(steps: int, cycle: Sequence[int], initial: int | None = None, tail: int = 1) -> list[int]:
    """A schedule that repeats ``cycle``, which begins with the last of ``initial`` full steps, and ends full.

    Args:
        steps: Length of the schedule.
        cycle: Multiples, the first being 1; 0 makes no model call.
        initial: Full steps at the beginning; None takes :func:`initial_steps`.
        tail: Full steps at the end.
    """
    if initial is None:
        initial = initial_steps(steps)
    middle = range(initial, max(steps - tail, initial))
    return [*[1] * min(initial, steps), *(cycle[(i - initial + 1) % len(cycle)] for i in middle), *[1] * tail][:steps]


def one_in(steps: int, n: int, multiple: int, initial: int | None = None, tail: int = 1) -> list[int]:
    """A schedule of one full step in ``n``, the others at ``multiple``."""
    return pattern(steps, [1, *[multiple] * (n - 1)], initial, tail)
