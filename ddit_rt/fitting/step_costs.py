"""What steps cost by the clock, on this machine, as shares of a full one."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..multiples import SKIP
from ..pipeline import accelerated, report
from ..trajectories import Prompt, call_with, denoise

WARMUP_RUNS, RUNS = 1, 3
_EQUAL = 3
"""Equal steps in a row; those after the first have nothing left to prepare, such as probes at earlier full steps."""


def shares_by_clock(
    pipe: Any,
    prompt: Prompt,
    multiples: Sequence[int],
    seed: int,
    settings: Mapping[str, Any],
    call: Mapping[str, Any],
) -> dict[int, float]:
    """Medians of the steps' seconds in a few short runs, after one that compiles and captures what there is.

    Steps run as :func:`ddit_rt.accelerate` runs them here: from captured graphs on CUDA. What a run spends beside its
    steps, on the prompt and on decoding, does not count.

    Args:
        pipe: A supported pipeline; left plain.
        prompt, seed: Of the runs.
        multiples: Of the coarse steps.
        settings: Further ones, of what coarse steps run.
        call: Arguments of the pipeline; its number of steps is not used.

    Returns:
        Multiple -> seconds over those of a full step, and the same of a skipped one.
    """
    kinds = [1, *multiples, SKIP]
    schedule = [1] * _EQUAL
    for kind in (*multiples, SKIP):
        schedule += [kind] * _EQUAL + [1] * (2 if kind != SKIP else 1)
    arguments = {**call_with(prompt, call), "num_inference_steps": len(schedule)}
    if "strength" in inspect.signature(pipe.__call__).parameters:
        arguments["strength"] = 1.0  # less would run fewer steps
    seconds: dict[int, list[float]] = {kind: [] for kind in kinds}
    with accelerated(pipe, schedule=schedule, **settings):
        for run in range(WARMUP_RUNS + RUNS):
            denoise(pipe, seed, arguments)
            steps = report(pipe).steps
            for before, step in pairwise(steps):
                if run >= WARMUP_RUNS and before.multiple == step.multiple and step.multiple in seconds:
                    seconds[step.multiple].append(step.seconds)
    typical = {kind: statistics.median(found) for kind, found in seconds.items() if found}
    return {kind: typical[kind] / typical[1] for kind in kinds[1:] if kind in typical}
