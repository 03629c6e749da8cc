"""One run of a pipeline: its picture or video, what it cost, and what each step did."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..pipeline import accelerated, report, restore
from ..trajectories import Outcome, timed_call
from .baselines import find_library, find_solver
from .flops import counted_flops


def generate(
    pipe: Any,
    settings: Mapping[str, Any] | None,
    seed: int,
    *,
    warmup_runs: int = 0,
    count_flops: bool = False,
    **call: Any,
) -> Outcome:
    """Calls ``pipe`` once, plain or accelerated, from the noise that ``seed`` gives.

    Args:
        pipe: A pipeline; whatever acceleration it has is replaced, and it is left plain.
        settings: Arguments of :func:`ddit_rt.accelerate`, ``{"library": {"type": ..., option: value, ...}}`` for
            another library or ``{"solver": ...}`` for another solver among
            :data:`~ddit_rt.evaluate.baselines.BASELINES`, or None for the plain pipeline.
        seed: Of a CPU generator, so that all devices start from the same noise.
        warmup_runs: The same call so many times before the one that counts; on CUDA the first captures graphs.
        count_flops: Count what the transformer executes, without CUDA graphs. Such a run is slow: no timing.
        **call: Arguments of the pipeline.

    Raises:
        ConfigError: the library or solver is unknown, the library not installed, the pipeline's scheduler none that
            another solver can replace, or settings are out of range.
    """
    restore(pipe)
    own = settings
    with ExitStack() as stack:
        cached = None
        if settings is not None and "library" in settings:
            library, options = find_library("settings", settings["library"])
            cached, own = stack.enter_context(library.enabled(pipe, options, call)), None
        if settings is not None and "solver" in settings:
            solver, options = find_solver("settings", settings["solver"])
            stack.enter_context(solver.enabled(pipe, options))
            own = None
        flops = stack.enter_context(counted_flops(pipe)) if count_flops else None
        if own is not None:
            stack.enter_context(accelerated(pipe, **{**own, "cuda_graphs": False} if count_flops else own))
        frames, seconds = timed_call(pipe, seed, call, warmup_runs)
        return Outcome(
            frames,
            seconds,
            report(pipe) if own is not None else None,
            cached() if cached is not None else None,
            flops.total if flops is not None else None,
        )
