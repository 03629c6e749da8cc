"""The policy that ``accelerate(pipe, speedup=...)`` stands for where nothing was fitted: a rule, and no measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ScheduleError
from ..multiples import SKIP
from .placement import WARP, evaluation_steps, moved_levels, takeovers_of
from .policy import StepView

EVALUATIONS = {
    "plain": ((27.1, 8), (33.6, 12), (39.3, 16), (50.5, 25), (59.2, 33)),
    "converged": ((24.3, 8), (31.4, 12), (37.0, 16), (44.5, 25), (46.8, 33)),
}
"""Mean PSNR in dB to the reference, and the evaluations that came to it on 64 guided prompts of the demo model."""

LEAST_EVALUATIONS = 2
"""A line needs two, of every transformer."""
LEAST_BY_DEFAULT = 10
"""Evaluations that a run keeps where nobody asked for a speed-up: few-step models have none to spare."""


@dataclass(frozen=True)
class TargetPolicy:
    """As many full steps as a target leaves, denser at high noise; the others are skipped.

    Args:
        speedup: Wanted ratio of FLOP, above 1; None with a quality.
        reference: What the run aims at, "plain" or "converged"; the second also moves the noise levels.
        asked: Somebody asked for this speed-up. Otherwise short runs keep :data:`LEAST_BY_DEFAULT` full steps.
        quality: Wanted PSNR in dB instead: the evaluations that come to it on the demo model, whatever the run's steps.
        boundaries: Noise levels below which another transformer takes over.
    """

    speedup: float | None
    reference: str = "plain"
    asked: bool = True
    quality: float | None = None
    boundaries: tuple[float, ...] = ()

    @property
    def least(self) -> int:
        """Evaluations that a run needs."""
        return LEAST_EVALUATIONS * (1 + len(self.boundaries))

    def evaluations(self, steps: int) -> int:
        """Full steps of a run of ``steps``."""
        if self.quality is not None:
            return min(max(_evaluations_for(self.quality, EVALUATIONS[self.reference]), self.least), steps)
        assert self.speedup is not None
        wanted = int(steps / self.speedup + 1e-9)
        return wanted if self.asked else min(max(wanted, LEAST_BY_DEFAULT), steps)

    def start(self, steps: int) -> None:
        """Raises:
        ScheduleError: the run is too short for the speed-up.
        """
        if self.evaluations(steps) < min(self.least, steps):
            shared = ", two of each transformer" if self.boundaries else ""
            reachable = f"ask for {steps / self.least:g} at most, or for more steps"
            way_out = reachable if steps > self.least else "make more steps, or give no target"
            raise ScheduleError(
                f"speedup={self.speedup:g}: a run of {steps} steps has to keep {self.least}{shared}; {way_out}."
            )

    def choose(self, step: StepView) -> int:
        takeovers = takeovers_of(step.sigmas, self.boundaries)
        full = evaluation_steps(step.steps, self.evaluations(step.steps), WARP[self.reference], takeovers)
        made = sum(index < step.index for index in full)
        # fewer runs to go on from than were made: another transformer took over where none was known to
        return 1 if step.index in full or step.runs < min(made, LEAST_EVALUATIONS) else SKIP

    def place(self, sigmas: Sequence[float]) -> Sequence[float]:
        """The noise levels themselves, or those that put every full step where it counts most."""
        evaluations = self.evaluations(len(sigmas) - 1)
        if self.reference == "plain" or evaluations < LEAST_EVALUATIONS:
            return sigmas
        return moved_levels(sigmas, evaluations, WARP[self.reference], self.boundaries)


def _evaluations_for(quality: float, known: Sequence[tuple[float, int]]) -> int:
    """The line through the two nearest known points, rounded up."""
    above = next((i for i, (decibels, _) in enumerate(known) if decibels >= quality), len(known) - 1)
    (low, few), (high, many) = known[max(above, 1) - 1], known[max(above, 1)]
    return math.ceil(few + (quality - low) / (high - low) * (many - few))
