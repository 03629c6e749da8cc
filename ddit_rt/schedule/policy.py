"""Which multiple the next step runs at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral

from ..config import SKIP, DDiTConfig
from ..errors import ScheduleError


def check_length(schedule: object, steps: int) -> None:
    """Checks a fixed schedule against the number of denoising steps, before the first of them.

    Raises:
        ScheduleError: the lengths differ.
    """
    if isinstance(schedule, Sequence) and len(schedule) != steps:
        raise ScheduleError(
            f"the schedule has {len(schedule)} entries, this run has {steps} denoising steps (image-to-image runs "
            "num_inference_steps x strength of them): give one multiple per step."
        )


def coarsest_below(patch_std: Mapping[int, float], threshold: float) -> int:
    """The largest multiple whose ρ-quantile is below τ, else 1 (paper, equation 5). NaN is below nothing."""
    return max((k for k, sigma in patch_std.items() if k > 1 and sigma < threshold), default=1)


class Policy:
    """Turns the evolution of the latent into a multiple, step by step.

    One instance serves one pipeline call: it counts the steps since the last full one and since the last model call.

    Args:
        config: Settings, :meth:`~ddit_rt.DDiTConfig.resolved` or without an ``"auto"`` limit.

    Attributes:
        steps: Denoising steps of the call, which a warm-up given as a share refers to.
    """

    def __init__(self, config: DDiTConfig) -> None:
        self._config = config
        self.steps = 0
        self._coarse_run = 0
        self._skipped_run = 0

    def choose(
        self,
        index: int,
        patch_std: Mapping[int, float],
        must_be_full: bool = False,
        may_skip: bool = True,
        decided: int | None = None,
    ) -> int:
        """The multiple of step ``index``, 0 for no model call.

        Args:
            index: Denoising step, from 0.
            patch_std: Multiple -> ρ-quantile σ_k; empty while the history fills, or where nothing here needs it.
            must_be_full: The step has to run at multiple 1, whatever the evolution says.
            may_skip: There are predictions to go on from.
            decided: The multiple that equation 5 gives, if it is already known; None takes it from ``patch_std``.

        Raises:
            ScheduleError: a callable schedule returned something that is not among the multiples.
        """
        schedule = self._config.schedule
        if callable(schedule):
            multiple = schedule(index, dict(patch_std))
            if not isinstance(multiple, Integral) or (multiple != SKIP and multiple not in self._config.multiples):
                raise ScheduleError(
                    f"the schedule returned {multiple!r} for step {index}: it must be one of {self._config.multiples}, "
                    f"or {SKIP} for no model call."
                )
            multiple = int(multiple)
        elif schedule is not None:
            multiple = schedule[index]
        elif index < self._initial_full_steps:
            multiple = 1
        else:
            multiple = self._by_evolution(patch_std, may_skip, decided)
        if must_be_full or (multiple == SKIP and not may_skip):
            multiple = 1
        self._coarse_run = self._coarse_run + 1 if multiple != 1 else 0
        self._skipped_run = self._skipped_run + 1 if multiple == SKIP else 0
        return multiple

    @property
    def _initial_full_steps(self) -> int:
        given = self._config.initial_full_steps
        return math.ceil(given * self.steps) if given < 1 else int(given)

    def _by_evolution(self, patch_std: Mapping[int, float], may_skip: bool, decided: int | None) -> int:
        config = self._config
        if isinstance(config.max_consecutive_coarse, Integral) and self._coarse_run >= config.max_consecutive_coarse:
            return 1
        # skipped steps go on from model predictions, and a model step shows in σ how far off they were
        limit = config.skip_below * config.threshold
        smooth = bool(patch_std) and all(sigma < limit for sigma in patch_std.values())
        if smooth and may_skip and self._skipped_run < config.max_consecutive_skipped:
            return SKIP
        return coarsest_below(patch_std, config.threshold) if decided is None else decided
