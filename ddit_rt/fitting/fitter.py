"""Fits schedules to a model: measures its steps along plain runs, searches, and runs what was found."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, OutOfReachError
from ..families import family_of
from ..granularity import Adapter, load_adapter
from ..multiples import SKIP, SUPPORTED_MULTIPLES
from ..pipeline import has_own_levels, identity_of, key_of_call
from ..schedule import (
    PSNR_LIMIT,
    WARP,
    FittedSchedule,
    ScheduleStore,
    check_quality,
    check_speedup,
    levels_of_evaluations,
    levels_of_steps,
    schedule_of,
    steps_of_levels,
)
from ..settings import shown
from ..trajectories import Prompt, call_with
from .error_model import ErrorModel
from .measurement import Progress, check_kinds, measure
from .real_runs import RealRuns, unmeasured
from .search import fewest_evaluations, find_evaluations, find_schedule
from .step_costs import shares_by_clock

logger = logging.getLogger(__name__)

_FINER = 2
"""Steps to measure along, of the call's own, where evaluations may lie between those."""


def fit_schedule(
    pipe: Any,
    prompts: Sequence[Prompt],
    speedup: float | None = None,
    kinds: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = lambda text: None,
    adapter: str | Path | Adapter | None = None,
    quality: float | None = None,
    reference: str = "plain",
    keep: bool = True,
    cost_ratios: Mapping[int, float] | None = None,
    costs: str = "flops",
    **call: Any,
) -> FittedSchedule:
    """Finds the schedule that ends nearest to a reference at a wanted speed-up, or the fastest of a wanted quality.

    Real runs choose among several: full and skipped steps where a search puts them and where the rule behind
    ``accelerate(pipe, speedup=...)`` does, and a mix with coarse steps; with an adapter also the mix that would be
    found if its coarse steps erred as delta's do. The rule's stays unless another is nearer by more than could be
    chance: by more than the standard error of the difference over the prompts.

    Args:
        pipe: A supported pipeline; left plain.
        prompts: A few that resemble your use; four do. Each costs about eight plain runs, once. Texts, or mappings of
            arguments of the pipeline's call that stand for one, such as ``{"prompt_embeds": ..., "image": ...}``, all
            of one size.
        speedup: Wanted ratio of FLOP, > 1; 2 if no quality is given either.
        kinds: Multiples that steps may run at, 0 for no model call; None takes p, 2p and 4p as far as the model can
            work with them, and 0. 21 and 22 span two frames of a video, see :mod:`ddit_rt.multiples`.
        seed: Of the first prompt's noise; the i-th prompt takes seed + i.
        progress: Called with a line of text before every run.
        adapter: What coarse steps run, as for :func:`ddit_rt.accelerate`; None fits untrained ones.
        quality: Wanted mean PSNR to the reference, in dB, instead of ``speedup``; 100, or more, is an equal picture.
        reference: ``"plain"``, the pipeline's own picture, or ``"converged"``, the one that infinitely many steps would
            give; the second takes full and skipped steps only, and moves the noise levels.
        keep: Also put it into the user's cache directory (:func:`ddit_rt.schedule.cache_directory`), where
            ``accelerate(pipe, speedup=...)`` finds it for this model and calls like this.
        cost_ratios: Multiple -> what a coarse step costs of a full one, in place of the ratio of this model's FLOP, as
            if it ran at another size. The wanted speed-up counts by them; what the schedule says of its own is still
            this model's FLOP, and it is not kept.
        costs: What the wanted speed-up is a ratio of, and what the search weighs steps by: ``"flops"``, or
            ``"seconds"`` of the steps, full, coarse and skipped ones as they are timed here first.
            ``accelerate(pipe, speedup=..., costs="seconds")`` finds such a schedule again, on such a machine.
        **call: Arguments of the pipeline; the schedule holds for this ``num_inference_steps`` alone, and for about
            this size and guidance.

    Raises:
        ConfigError: a kind or reference is unknown, the model cannot work with a kind, both targets are given, there is
            no prompt, prompts differ in the size of the latent or in noise levels, too few steps, or a cost ratio that
            no step can have.
        OutOfReachError: no schedule of these kinds is that fast, or that good.
        UnsupportedPipelineError: the pipeline, or this way to call it, cannot run coarsely.
        AdapterMismatchError: the adapter was made for another model, or lacks one of the kinds.
    """
    check_target(speedup, quality, reference, kinds, cost_ratios, costs)
    fitter = Fitter(pipe, prompts, kinds, seed, progress, adapter, reference, cost_ratios, costs, **call)
    if quality is not None:
        found = fitter.of_quality(quality)
    else:
        found = fitter.at_speedup(2.0 if speedup is None else speedup)
    if keep and cost_ratios is None:
        fitter.keep(found)
    return found


class Fitter:
    """Fits schedules for one model and one kind of call; one measurement and one set of plain runs serve all of them.

    Args:
        pipe, prompts, kinds, seed, progress, adapter, reference, cost_ratios, costs, call: As for
            :func:`fit_schedule`.

    Attributes:
        error_model: What was measured, with the cost ratios that were given or timed.
        steps: Denoising steps of a run.

    Raises:
        ConfigError, UnsupportedPipelineError, AdapterMismatchError: as :func:`fit_schedule`.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        kinds: Sequence[int] | None = None,
        seed: int = 0,
        progress: Progress = lambda text: None,
        adapter: str | Path | Adapter | None = None,
        reference: str = "plain",
        cost_ratios: Mapping[int, float] | None = None,
        costs: str = "flops",
        **call: Any,
    ) -> None:
        multiples = family_of(pipe).multiples
        known = (*(k for k in multiples if k in SUPPORTED_MULTIPLES), SKIP)
        self._kinds = known if kinds is None else kinds
        check_kinds(self._kinds, multiples)
        check_cost_ratios(cost_ratios or {}, multiples)
        converged = reference == "converged"
        coarse = [] if converged else [kind for kind in self._kinds if kind > 1]
        settings: dict[str, Any] = {}
        self._trained = load_adapter(adapter) if adapter is not None and coarse else None
        if self._trained is not None:
            settings = {"coarse": "adapter", "adapter": self._trained, "multiples": (1, *coarse)}
        parameters = inspect.signature(pipe.__call__).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            for name in call:
                if name not in parameters:
                    raise ConfigError(
                        f"{name}={shown(call[name])}: no argument of fit, nor of {type(pipe).__name__}; settings of "
                        "runs belong to accelerate."
                    )
        if "num_inference_steps" not in call:
            call["num_inference_steps"] = parameters["num_inference_steps"].default
        for prompt in prompts:
            given = call_with(prompt, call)
            if converged and "strength" in parameters and given.get("strength", parameters["strength"].default) < 1:
                raise ConfigError(
                    "reference='converged' is fitted for whole runs: pass strength=1.0, or leave it plain."
                )
        self._pipe, self._reference, self._progress = pipe, reference, progress
        self._by_clock = costs == "seconds"
        self._boundaries = family_of(pipe).boundaries(pipe)
        self._runs = RealRuns(pipe, prompts, seed, progress, settings, reference, call)
        finer = _FINER if converged else 1
        found = measure(pipe, prompts, coarse, seed, progress, self._trained, finer, **call)
        if self._by_clock:
            progress("timing steps")
            cost_ratios = shares_by_clock(pipe, prompts[0], coarse, seed, settings, call)
        self.error_model = replace(found, shares={**found.shares, **(cost_ratios or {})})
        self.steps = found.steps // finer  # of a run from a picture fewer than the call's

    def at_speedup(self, speedup: float, kinds: Sequence[int] | None = None) -> FittedSchedule:
        """The schedule whose real runs end nearest to the reference, among those found for a speed-up.

        Args:
            speedup: As for :func:`fit_schedule`.
            kinds: Some of those that were given; None for all.

        Raises:
            OutOfReachError: no schedule of these kinds is that fast.
        """
        self._progress("searching")
        kinds = self._kinds if kinds is None else kinds
        return self._finished(
            self._runs.best(
                *_at_speedup(self.error_model, self._reference, self.steps, speedup, kinds, self._boundaries)
            )
        )

    def of_quality(self, quality: float) -> FittedSchedule:
        """The schedule of the fewest evaluations whose real runs reach a quality.

        Args:
            quality: As for :func:`fit_schedule`.

        Raises:
            OutOfReachError: no schedule is that good.
        """
        self._progress("searching")
        return self._finished(_of_quality(self._runs, self.error_model, self.steps, quality, self._boundaries))

    def measured(self, schedule: Sequence[int]) -> FittedSchedule:
        """A schedule with what its real runs give."""
        return self._finished(self._runs.measured(unmeasured(schedule)))

    def keep(self, found: FittedSchedule) -> None:
        """Puts a schedule into the user's cache directory, where calls with a target find it."""
        _keep(self._pipe, found, self._runs.seen, self._trained, "seconds" if self._by_clock else "flops")

    def _finished(self, found: FittedSchedule) -> FittedSchedule:
        """With the sensitivity that was measured, and how fast it is by the clock if that counts."""
        measured = np.asarray(self.error_model.sensitivity)
        places = np.linspace(0, 1, self.steps), np.linspace(0, 1, self.error_model.steps)
        sensitivity = np.interp(*places, measured)
        seconds = self.steps / self.error_model.cost(found.schedule) if self._by_clock else None
        return replace(found, sensitivity=[float(f"{gain:.3g}") for gain in sensitivity], seconds_speedup=seconds)


def check_cost_ratios(cost_ratios: Mapping[int, float], multiples: Sequence[int]) -> None:
    """Refuses what no coarse step can cost of a full one.

    Raises:
        ConfigError: naming the multiple and the ratio.
    """
    for multiple, ratio in cost_ratios.items():
        if multiple not in multiples or multiple == 1:
            coarse = ", ".join(str(kind) for kind in multiples if kind > 1)
            raise ConfigError(f"cost_ratios: {multiple} is none of the coarse multiples {coarse}.")
        if not 0 < ratio < 1:
            raise ConfigError(f"cost_ratios: {multiple} costs {ratio:g} of a full step: a number between 0 and 1.")


def check_target(
    speedup: float | None,
    quality: float | None,
    reference: str,
    kinds: Sequence[int] | None,
    cost_ratios: Mapping[int, float] | None = None,
    costs: str = "flops",
) -> None:
    """Refuses what :func:`fit_schedule` cannot aim at.

    Raises:
        ConfigError: naming the value.
    """
    if speedup is not None and quality is not None:
        raise ConfigError(f"speedup={speedup:g} and quality={quality:g}: ask for one of them.")
    if speedup is not None:
        check_speedup(speedup)
    if quality is not None:
        check_quality(quality)
    if costs not in ("flops", "seconds"):
        raise ConfigError(f"costs={costs!r}: use 'flops' or 'seconds'.")
    if costs == "seconds" and cost_ratios is not None:
        raise ConfigError("costs='seconds' and cost_ratios: steps are timed, or their ratios given; leave out one.")
    if quality is not None and (cost_ratios is not None or costs == "seconds"):
        counted = "cost_ratios" if cost_ratios is not None else "costs='seconds'"
        raise ConfigError(f"quality={quality:g} and {counted}: a quality has no cost to count; leave out one of them.")
    if reference not in WARP:
        raise ConfigError(f"reference={reference!r}: use one of {', '.join(map(repr, WARP))}.")
    if kinds is None:
        return
    check_kinds(kinds)
    if 1 not in kinds:
        raise ConfigError(f"kinds={list(kinds)}: a run begins with full steps; allow 1 among the kinds.")
    if (reference == "converged" or quality is not None) and SKIP not in kinds:
        raise ConfigError(f"kinds={list(kinds)}: this target is reached by skipped steps; allow 0 among the kinds.")


def _keep(pipe: Any, found: FittedSchedule, arguments: Mapping[str, Any], adapter: Adapter | None, costs: str) -> None:
    """Puts a schedule where calls with a target look for it."""
    family = family_of(pipe)
    try:
        store, identity = ScheduleStore(), identity_of(pipe, family, adapter)
    except ConfigError as error:
        logger.warning("the schedule is not kept for later calls: %s", error)
        return
    key = key_of_call(pipe, family, pipe.scheduler, arguments, found.reference, identity, costs)
    if key is None or has_own_levels(arguments):
        logger.warning(
            "the schedule is not kept for later calls: they may run a part of their steps, have noise levels of their "
            "own, or no size; save it, and give accelerate its file"
        )
        return
    store.save(key, found, str(getattr(pipe, "name_or_path", "") or ""))


def _at_speedup(
    error_model: ErrorModel,
    reference: str,
    steps: int,
    speedup: float,
    kinds: Sequence[int],
    boundaries: Sequence[float],
) -> tuple[list[FittedSchedule], FittedSchedule | None]:
    """Schedules that the error model thinks best at a speed-up, and the rule; which of them is the rule's."""
    found: list[FittedSchedule] = []
    standing = None
    # m full and n - m skipped steps cost n / speedup full ones
    skipped = error_model.shares.get(SKIP, 0.0)
    evaluations = int(steps * (1 / speedup - skipped) / max(1 - skipped, 1e-6) + 1e-9)
    if SKIP in kinds and evaluations >= 2:
        found, standing = _skipping(error_model, reference, steps, evaluations, boundaries)
    # those of full and skipped steps alone have just been searched
    if reference == "plain" and (not found or any(kind > 1 for kind in kinds)):
        schedules = [find_schedule(error_model, speedup, kinds)]
        # first order flatters coarse steps where steps are long, and an adapter where its errors add up
        if error_model.adapter_residual:
            schedules.append(find_schedule(replace(error_model, adapter_residual={}), speedup, kinds))
        found += [unmeasured(schedule) for schedule in schedules]
    if not found:
        most = steps / (2 + (steps - 2) * skipped)
        raise OutOfReachError(f"speedup={speedup:g}: {steps} steps have to keep 2; ask for {most:.3g} at most.")
    return found, standing


def _skipping(
    error_model: ErrorModel, reference: str, steps: int, evaluations: int, boundaries: Sequence[float]
) -> tuple[list[FittedSchedule], FittedSchedule]:
    """Schedules of so many evaluations, and which of them is the rule's.

    The others are of three searches, one of which trusts the latents that the model looks at.
    """
    trusting = replace(error_model, looks_aside=False)
    searched = [find_evaluations(model, evaluations) for model in (error_model, trusting)]
    if evaluations < error_model.steps:
        counting = replace(error_model, shares={})  # evaluations, whatever a skipped step costs
        searched.append(find_schedule(counting, error_model.steps / evaluations, (1, SKIP)))
    if reference == "plain":
        by_rule = unmeasured(schedule_of(steps, evaluations, WARP["plain"], error_model.takeovers))
        return [*map(unmeasured, searched), by_rule], by_rule
    curve = [float(sigma) for sigma in error_model.sigmas]
    placed = [[curve[t] for t, kind in enumerate(candidate) if kind == 1] for candidate in searched]
    placed.append(levels_of_evaluations(curve, evaluations, WARP["converged"], boundaries))
    found = []
    for levels in placed:
        at = steps_of_levels(steps, levels, WARP["converged"], boundaries)
        schedule = [1 if t in at else SKIP for t in range(steps)]
        sigmas = [float(f"{level:.6g}") for level in levels_of_steps(steps, at, levels, curve[-1], boundaries)]
        found.append(replace(unmeasured(schedule), sigmas=sigmas, reference="converged"))
    return found, found[-1]


def _of_quality(
    runs: RealRuns, error_model: ErrorModel, steps: int, quality: float, boundaries: Sequence[float]
) -> FittedSchedule:
    """The fewest evaluations whose real runs reach a quality, by bisection."""
    low, high, reached = fewest_evaluations(error_model), steps, -math.inf
    best: FittedSchedule | None = None
    while low <= high:
        middle = (low + high) // 2
        found = runs.best(*_skipping(error_model, runs.reference, steps, middle, boundaries))
        reached = max(reached, runs.quality_of(found))
        if runs.quality_of(found) >= min(quality, PSNR_LIMIT):
            best, high = found, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise OutOfReachError(
            f"quality={quality:g}: {steps} full steps come to {reached:.1f} dB here. Ask for less, or more steps."
        )
    return best
