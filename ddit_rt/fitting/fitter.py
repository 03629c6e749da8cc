"""Fits schedules to a model: measures its steps along plain runs, searches, and runs what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..config import SKIP
from ..granularity import Adapter, load_adapter
from ..schedule import FittedSchedule, check_speedup
from ..trajectories import generate, psnr
from .measurement import Progress, check_kinds, measure
from .search import find_schedule


def fit_schedule(
    pipe: Any,
    prompts: Sequence[str],
    speedup: float = 2.0,
    kinds: Sequence[int] = (1, 2, 4, SKIP),
    seed: int = 0,
    progress: Progress = lambda text: None,
    adapter: str | Path | Adapter | None = None,
    **call: Any,
) -> FittedSchedule:
    """Finds the schedule that stays nearest to the plain pipeline at a wanted ratio of FLOP.

    The best, in real runs, of the one that may use every kind and the one without coarse steps; with an adapter also
    of the one that would be found if its coarse steps erred as delta's do.

    Args:
        pipe: A supported pipeline; left plain.
        prompts: A few that resemble your use; four do. Each costs about eight plain runs, once.
        speedup: Wanted ratio of FLOP, > 1.
        kinds: Multiples that steps may run at, 0 for no model call.
        seed: Of the first prompt's noise; the i-th prompt takes seed + i.
        progress: Called with a line of text before every run.
        adapter: What coarse steps run, as for :func:`ddit_rt.accelerate`; None fits untrained ones.
        **call: Arguments of the pipeline; the schedule holds for this ``num_inference_steps`` alone, and for about
            this size and guidance.

    Raises:
        ConfigError: a kind is unknown, there is no prompt, or there are too few steps.
        OutOfReachError: no schedule of these kinds is that fast.
        UnsupportedPipelineError: the pipeline, or this way to call it, cannot run coarsely.
        AdapterMismatchError: the adapter was made for another model, or lacks one of the kinds.
    """
    check_speedup(speedup)
    check_kinds(kinds)
    multiples = [kind for kind in kinds if kind > 1]
    settings: dict[str, Any] = {}
    if adapter is not None:
        adapter = load_adapter(adapter)
        settings = {"coarse": "adapter", "adapter": adapter, "multiples": (1, *multiples)}
    error_model = measure(pipe, prompts, multiples, seed, progress, adapter, **call)
    progress("searching")
    schedules = [find_schedule(error_model, speedup, kinds)]
    # first order flatters coarse steps where steps are long, and an adapter where its errors add up: real runs choose
    if error_model.adapter_residual:
        schedules.append(find_schedule(replace(error_model, adapter_residual={}), speedup, kinds))
    if SKIP in kinds:
        schedules.append(find_schedule(error_model, speedup, (1, SKIP)))
    different = [s for i, s in enumerate(schedules) if s not in schedules[:i]]
    trials = (try_schedule(pipe, s, prompts, seed, progress, settings, **call) for s in different)
    found = max(trials, key=lambda trial: trial.psnr)
    return replace(found, sensitivity=[float(f"{gain:.3g}") for gain in error_model.sensitivity])


def try_schedule(
    pipe: Any,
    schedule: Sequence[int],
    prompts: Sequence[str],
    seed: int = 0,
    progress: Progress = lambda text: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **call: Any,
) -> FittedSchedule:
    """Runs a schedule and the plain pipeline, and says how fast and how near to it the schedule is.

    Args:
        pipe, prompts, seed, progress, call: As for :func:`fit_schedule`.
        schedule: One multiple per step, 0 for no model call.
        settings: Further settings of :func:`ddit_rt.accelerate`.

    Returns:
        The schedule with its FLOP speed-up and its PSNR in dB, means over the prompts; no sensitivity.
    """
    speedups, decibels = [], []
    for i, prompt in enumerate(prompts):
        progress(f"trying: {prompt}")
        plain = generate(pipe, None, seed + i, **{**call, "prompt": prompt})
        fast = generate(pipe, {"schedule": list(schedule), **settings}, seed + i, **{**call, "prompt": prompt})
        assert fast.report is not None
        speedups.append(fast.report.speedup_estimate)
        decibels.append(psnr(fast.frames, plain.frames))
    return FittedSchedule(list(schedule), float(np.mean(speedups)), float(np.mean(decibels)), len(prompts))
