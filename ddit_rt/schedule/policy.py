"""Which multiple the next step runs at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import DDiTConfig
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

    One instance serves one pipeline call: it counts the coarse steps since the last fine one.
    """

    def __init__(self, config: DDiTConfig) -> None:
        self._config = config
        self._coarse_run = 0

    def choose(self, index: int, patch_std: Mapping[int, float], must_refine: bool = False) -> int:
        """The multiple of step ``index``.

        Args:
            index: Denoising step, from 0.
            patch_std: Multiple -> ρ-quantile σ_k; empty while the history fills.
            must_refine: The step has to run at multiple 1, whatever the evolution says.

        Raises:
            ScheduleError: a callable schedule returned something that is not among the multiples.
        """
        schedule = self._config.schedule
        if callable(schedule):
            multiple = schedule(index, dict(patch_std))
            if multiple not in self._config.multiples:
                raise ScheduleError(
                    f"the schedule returned {multiple!r} for step {index}: it must be one of {self._config.multiples}."
                )
        elif schedule is not None:
            multiple = schedule[index]
        else:
            multiple = coarsest_below(patch_std, self._config.threshold)
            limit = self._config.max_coarse_run
            if limit is not None and self._coarse_run >= limit:
                multiple = 1
        if must_refine:
            multiple = 1
        self._coarse_run = self._coarse_run + 1 if multiple > 1 else 0
        return multiple
