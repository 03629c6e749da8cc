"""The paper's policy: as coarse as the latent's evolution is smooth, within rules of spacing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..multiples import SKIP
from .policy import StepView


@dataclass(frozen=True)
class ThresholdPolicy:
    """Equation 5 of the paper: the coarsest multiple whose σ_k lies below τ.

    Args:
        threshold: τ, in latent units.
        initial_full_steps: First steps that run full: a share of the call's steps if below 1, else their number.
        max_consecutive_coarse: Longest run of steps that are not full; None for no limit.
        skip_below: Share of τ below which every σ_k has to lie for a step to be skipped; 0 skips none.
        max_consecutive_skipped: Longest run of skipped steps.
    """

    threshold: float
    initial_full_steps: float = 0.0
    max_consecutive_coarse: int | None = None
    skip_below: float = 0.0
    max_consecutive_skipped: int = 1

    def start(self, steps: int) -> None:
        """Serves any number of steps."""

    def choose(self, step: StepView) -> int:
        initial = self.initial_full_steps
        if step.index < (math.ceil(initial * step.steps) if initial < 1 else int(initial)):
            return 1
        if self.max_consecutive_coarse is not None and step.consecutive_coarse >= self.max_consecutive_coarse:
            return 1
        # skipped steps go on from model predictions, and a model step shows in σ how far off they were
        if self.skip_below > 0 and step.runs and step.consecutive_skipped < self.max_consecutive_skipped:
            limit, patch_std = self.skip_below * self.threshold, step.patch_std
            if patch_std and all(sigma < limit for sigma in patch_std.values()):
                return SKIP
        return step.smooth_multiple
