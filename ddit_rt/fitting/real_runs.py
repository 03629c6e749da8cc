"""Runs schedules for real, and says how fast they are and how near they end to the plain and the converged picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ..pipeline import OWN_LEVELS, arguments_seen
from ..schedule import FittedSchedule
from ..trajectories import Prompt, call_with, generate, generate_converged, limited_psnr, name_of
from .measurement import Progress


def unmeasured(schedule: Sequence[int]) -> FittedSchedule:
    """A schedule of which no run is known."""
    return FittedSchedule(list(schedule), 1.0, 0.0, 0)


class RealRuns:
    """Real runs of schedules, against references that are made once per prompt.

    Attributes:
        seen: Arguments of the pipeline's calls, defaults filled in.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        seed: int,
        progress: Progress,
        settings: Mapping[str, Any],
        reference: str,
        call: Mapping[str, Any],
    ) -> None:
        self.reference = reference
        self.call = call
        self._pipe, self._prompts, self._seed, self._progress = pipe, prompts, seed, progress
        self._settings = settings
        self.seen: Mapping[str, Any] = {}
        self._plain: dict[int, Any] = {}
        self._converged: dict[int, Any] = {}

    def best(self, candidates: Sequence[FittedSchedule], standing: FittedSchedule | None = None) -> FittedSchedule:
        """The candidate whose runs end nearest to the reference, with what they gave.

        Args:
            candidates: To run.
            standing: One of them that stays unless another is nearer by more than the standard error of the difference
                over the prompts. The nearest of several on a few prompts is so by chance, too.
        """
        different = [c for i, c in enumerate(candidates) if c not in candidates[:i]]
        tried = [self._tried(candidate) for candidate in different]
        nearest = max(tried, key=lambda one: self.quality_of(one[0]))
        if standing is None or len(self._prompts) < 2:
            return nearest[0]
        stays = tried[different.index(standing)]
        gained = np.subtract(nearest[1], stays[1])
        error = float(np.std(gained, ddof=1)) / len(gained) ** 0.5
        return nearest[0] if float(np.mean(gained)) > error else stays[0]

    def quality_of(self, fitted: FittedSchedule) -> float:
        """dB to the reference."""
        return fitted.psnr if fitted.psnr_converged is None else fitted.psnr_converged

    def measured(self, fitted: FittedSchedule) -> FittedSchedule:
        """The schedule with its FLOP speed-up and its PSNR, means over the prompts."""
        return self._tried(fitted)[0]

    def _tried(self, fitted: FittedSchedule) -> tuple[FittedSchedule, list[float]]:
        """A schedule as of :meth:`measured`, and what it gave for every prompt, in dB to the reference."""
        speedups, decibels, to_converged = [], [], []
        for i, prompt in enumerate(self._prompts):
            self._progress(f"trying: {name_of(prompt, i)}")
            arguments = call_with(prompt, self.call)
            if i not in self._plain:
                with arguments_seen(self._pipe) as seen:
                    self._plain[i] = generate(self._pipe, None, self._seed + i, **arguments).frames
                self.seen = {**seen[0], **{name: arguments.get(name) for name in OWN_LEVELS}}
                if self.reference == "converged":
                    self._converged[i] = generate_converged(self._pipe, self._seed + i, **arguments).frames
            fast = generate(self._pipe, {"schedule": fitted, **self._settings}, self._seed + i, **arguments)
            assert fast.report is not None
            speedups.append(fast.report.speedup_estimate)
            decibels.append(limited_psnr(fast.frames, self._plain[i]))
            if self._converged:
                to_converged.append(limited_psnr(fast.frames, self._converged[i]))
        measured = replace(
            fitted,
            speedup=float(np.mean(speedups)),
            psnr=float(np.mean(decibels)),
            prompts=len(self._prompts),
            psnr_converged=float(np.mean(to_converged)) if to_converged else None,
        )
        return measured, to_converged or decibels


def try_schedule(
    pipe: Any,
    schedule: Sequence[int],
    prompts: Sequence[Prompt],
    seed: int = 0,
    progress: Progress = lambda text: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **call: Any,
) -> FittedSchedule:
    """Runs a schedule and the plain pipeline, and says how fast and how near to it the schedule is.

    Args:
        pipe, prompts, seed, progress, call: As for :func:`~ddit_rt.fitting.fit_schedule`.
        schedule: One multiple per step, 0 for no model call.
        settings: Further settings of :func:`ddit_rt.accelerate`.

    Returns:
        The schedule with its FLOP speed-up and its PSNR in dB, means over the prompts; no sensitivity.
    """
    return RealRuns(pipe, prompts, seed, progress, settings, "plain", call).measured(unmeasured(schedule))
