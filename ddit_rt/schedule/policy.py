"""When to be coarse: the contract of a policy, what it may read of a step, and schedules that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, runtime_checkable

from ..errors import ScheduleError
from ..multiples import SKIP, volume


class Evolution(Protocol):
    """How the latent has evolved up to a step. Both methods may wait for the device."""

    def decision(self) -> int:
        """The coarsest multiple whose ρ-quantile σ_k is below τ, else 1 (paper, equation 5)."""
        ...

    def wait(self) -> Mapping[int, float]:
        """Multiple -> ρ-quantile σ_k of the per-patch standard deviations; takes longer than the decision."""
        ...


@dataclass(frozen=True)
class StepView:
    """What a policy may read of a denoising step before it runs.

    Attributes:
        index: Of the step, from 0.
        steps: Denoising steps of the call.
        sigma: Noise level in [0, 1].
        consecutive_coarse: Steps since the last full one, coarse and skipped ones.
        consecutive_skipped: Skipped steps since the last model call.
        runs: Predictions that a skipped step could go on from, at most 2: the model's last ones, of the transformer
            whose turn it is.
        evolution: Of the latent; None while its history fills.
        sigmas: Noise levels of all the call's steps; empty where they are not known.
    """

    index: int
    steps: int
    sigma: float = 0.0
    consecutive_coarse: int = 0
    consecutive_skipped: int = 0
    runs: int = 2
    evolution: Evolution | None = None
    sigmas: tuple[float, ...] = ()

    @property
    def smooth_multiple(self) -> int:
        """The multiple of the paper's equation 5: 1 while the history fills. Waits for the decision alone."""
        return 1 if self.evolution is None else self.evolution.decision()

    @property
    def patch_std(self) -> Mapping[int, float]:
        """Multiple -> σ_k, empty while the history fills. Waits for the quantiles."""
        return {} if self.evolution is None else self.evolution.wait()


@runtime_checkable
class Policy(Protocol):
    """Chooses the multiple of every denoising step.

    A policy keeps nothing between steps: what it needs to know of the steps before is in the :class:`StepView`. So one
    object may serve any number of calls and threads. It reads the evolution only where its choice depends on it, since
    reading waits for the device.

    A policy may also have a method ``place(sigmas) -> sigmas``: it is given the scheduler's noise levels, n + 1 of them
    for n steps, before a call's first step, and returns those that the call shall have.
    """

    def start(self, steps: int) -> None:
        """Called before the first of a call's ``steps`` denoising steps.

        Raises:
            ScheduleError: the policy cannot serve a call of so many steps.
        """
        ...

    def choose(self, step: StepView) -> int:
        """The multiple to run at, or 0 to skip the step: to forecast its prediction instead of calling the model.

        Not called for a step that has to be full whatever the policy says.
        """
        ...


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


class KnownEvolution:
    """An evolution whose σ_k are known numbers, recorded in a run or made up.

    Args:
        patch_std: Multiple -> σ_k.
        threshold: τ.
    """

    def __init__(self, patch_std: Mapping[int, float], threshold: float) -> None:
        self._patch_std, self._threshold = patch_std, threshold

    def decision(self) -> int:
        return coarsest_below(self._patch_std, self._threshold)

    def wait(self) -> Mapping[int, float]:
        return self._patch_std


def coarsest_below(patch_std: Mapping[int, float], threshold: float) -> int:
    """The coarsest multiple whose ρ-quantile is below τ, else 1 (paper, equation 5). NaN is below nothing."""
    return max((k for k, sigma in patch_std.items() if k > 1 and sigma < threshold), key=volume, default=1)


@dataclass
class Spacing:
    """Counts the steps since the last full one and since the last model call."""

    consecutive_coarse: int = 0
    consecutive_skipped: int = 0

    def add(self, multiple: int) -> None:
        """Takes in the multiple that a step ran at."""
        self.consecutive_coarse = self.consecutive_coarse + 1 if multiple != 1 else 0
        self.consecutive_skipped = self.consecutive_skipped + 1 if multiple == SKIP else 0


def choices_along(policy: Policy, curves: Sequence[Mapping[int, float]], threshold: float) -> list[int]:
    """What a policy would choose along recorded σ curves.

    Args:
        policy: Any.
        curves: Per step multiple -> σ_k, empty while the history filled.
        threshold: τ.
    """
    spacing, chosen = Spacing(), []
    for index, patch_std in enumerate(curves):
        evolution = KnownEvolution(patch_std, threshold) if patch_std else None
        counts = (spacing.consecutive_coarse, spacing.consecutive_skipped)
        chosen.append(policy.choose(StepView(index, len(curves), 0.0, *counts, evolution=evolution)))
        spacing.add(chosen[-1])
    return chosen
