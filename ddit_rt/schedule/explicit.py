"""Schedules that are given: a sequence of multiples, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from ..config import SKIP
from ..errors import ScheduleError
from .policy import StepView


@dataclass(frozen=True)
class FixedSchedule:
    """One multiple per denoising step, 0 for a skipped one; fitted schedules are of this kind.

    Args:
        multiples: In the order of the steps.
    """

    multiples: Sequence[int]

    def start(self, steps: int) -> None:
        """Raises:
        ScheduleError: the schedule has another length, or begins with a skipped step.
        """
        if len(self.multiples) != steps:
            raise ScheduleError(
                f"the schedule has {len(self.multiples)} entries, this run has {steps} denoising steps (image-to-image "
                "runs num_inference_steps x strength of them): give one multiple per step."
            )
        if self.multiples and self.multiples[0] == SKIP:
            raise ScheduleError("schedule[0]=0: the first step has no prediction to go on from; begin with 1.")

    def choose(self, step: StepView) -> int:
        return self.multiples[step.index]


@dataclass(frozen=True)
class CallableSchedule:
    """A function (step index, {multiple: σ_k}) -> multiple.

    Args:
        function: Called once per step; the mapping is its own copy.
        multiples: What it may return, beside 0.
    """

    function: Callable[[int, Mapping[int, float]], int]
    multiples: Sequence[int]

    def start(self, steps: int) -> None:
        """Serves any number of steps."""

    def choose(self, step: StepView) -> int:
        """Raises:
        ScheduleError: the function returned something that is not among the multiples.
        """
        multiple = self.function(step.index, dict(step.patch_std))
        if not isinstance(multiple, Integral) or (multiple != SKIP and multiple not in self.multiples):
            raise ScheduleError(
                f"the schedule returned {multiple!r} for step {step.index}: it must be one of {tuple(self.multiples)}, "
                f"or {SKIP} for no model call."
            )
        return int(multiple)
