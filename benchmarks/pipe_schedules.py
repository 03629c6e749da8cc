"""The schedules that pipelines are measured with."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt.multiples import SKIP
from ddit_rt.schedule import WARP, schedule_of

PAPER_SPEEDUP = 2.18  # fewer FLOP, DDiT on FLUX.1-dev
SIZE_STEPS = 10  # of runs that show what a step costs
# every size follows every other and itself
PAIRS = (1, 1, 2, 2, 4, 4, 1, 1, 4, 4, 2, 2)


@dataclass(frozen=True)
class Plan:
    """One run to measure.

    Attributes:
        name: Of the schedule.
        steps: Denoising steps.
        multiples: Size of every step, 0 for none; None lets the policy decide, with a τ below which nothing lies: every
            step stays full, after a decision.
        coarse: What a coarse step computes.
    """

    name: str
    steps: int
    multiples: tuple[int, ...] | None
    coarse: str = "delta"

    def settings(self, multiples: Sequence[int]) -> dict[str, Any]:
        """Arguments of :func:`ddit_rt.accelerate` that run ``multiples``.

        As a callable, so that every step waits for the decision's values, as it would with the policy (and a little
        longer: the policy does not wait for the values).
        """
        if self.multiples is None:
            return {"threshold": 1e-30}
        return {"schedule": lambda index, patch_std: multiples[index], "coarse": self.coarse}

    def short(self) -> tuple[int, ...]:
        """What it takes to compile and capture all that the plan runs: no more than two equal steps in a row.

        The first steps stay as they are, since the first decision comes with the fifth.
        """
        multiples = self.multiples or (1,) * self.steps
        rest = (tuple(group)[:2] for _, group in itertools.groupby(multiples[5:]))
        return multiples[:5] + tuple(itertools.chain.from_iterable(rest))


def speedup(multiples: Sequence[int], flops: Mapping[int, float]) -> float:
    """FLOP of as many full steps over the FLOP of ``multiples`` on the delta path, as a report estimates it.

    A coarse step needs the coarse model's residual at the last two full steps; each that is not there yet costs a run.
    """
    spent = 0.0
    anchors: deque[set[int]] = deque(maxlen=2)
    for multiple in multiples:
        if multiple == SKIP:
            continue
        spent += flops[multiple]
        if multiple == 1:
            anchors.append(set())
            continue
        for known in anchors:
            spent += 0.0 if multiple in known else flops[multiple]
            known.add(multiple)
    return len(multiples) * flops[1] / spent


def mixed(steps: int, flops: Mapping[int, float], target: float = PAPER_SPEEDUP) -> tuple[int, ...]:
    """A schedule of all sizes that needs ``target`` times fewer FLOP than full steps, as nearly as steps allow.

    The first eighth is full, as the policy leaves it; full steps refresh the rest at even distances, the last one among
    them; between them 4p comes first, then 2p. Of equally near schedules, the one that uses both most evenly.
    """
    initial_full_steps = math.ceil(steps / 8)
    rest = steps - initial_full_steps
    found = []
    for full in range(1, rest - 1):
        refreshed = {initial_full_steps + round(i * rest / full) - 1 for i in range(1, full + 1)}
        places = [i for i in range(initial_full_steps, steps) if i not in refreshed]
        for coarsest in range(1, len(places)):
            multiples = [1] * steps
            for order, place in enumerate(places):
                multiples[place] = 4 if order < coarsest else 2
            off = round(abs(speedup(multiples, flops) - target), 2)
            found.append((off, abs(2 * coarsest - len(places)), tuple(multiples)))
    return min(found)[2]


def plans(provider: str, steps: int, more_steps: int | None, flops: Mapping[int, float]) -> list[Plan]:
    """What to measure of a provider, most telling first.

    Args:
        steps: Of the model's usual run.
        more_steps: Of a second, longer one; None for none.
        flops: Of one model run per size.
    """
    if provider.startswith("stock") or "teacache" in provider:
        counts = [steps] if more_steps is None or provider != "stock" else [steps, more_steps]
        return [Plan("p", count, (1,) * count) for count in counts]
    few = min(steps, SIZE_STEPS)
    sizes = {k: Plan("p" if k == 1 else f"{k}p", few, (k,) * few) for k in (1, 2, 4)}
    found = [Plan("mixed", steps, mixed(steps, flops))]
    if "batch" in provider:
        return found
    if "adapter" in provider:  # its full steps are those of the others
        return [*found, sizes[4], sizes[2]]
    # what a fit finds has this form: full steps, dense at high noise, and steps without a model run between them
    fitted = schedule_of(steps, round(steps / PAPER_SPEEDUP), WARP["plain"])
    found += [Plan("fitted", steps, tuple(fitted)), sizes[4], sizes[2]]
    if provider == "ours":  # eager full steps are those of the plain pipeline
        return found
    found.append(sizes[1])
    if provider == "ours+graphs":
        # nothing but the size differs between its steps: band-split runs the model once per step
        pairs = (1, *PAIRS * 2)
        found += [Plan("switching", len(pairs), pairs, "band-split"), Plan("decided", few, None)]
        if more_steps is not None:
            found.append(Plan("mixed", more_steps, mixed(more_steps, flops)))
    return found
