"""Measures along plain runs what the search needs: predictions, coarse outputs, costs, sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import SKIP, SUPPORTED_MULTIPLES
from ..errors import ConfigError
from ..granularity import Adapter, PredictionHistory
from ..trajectories import Errors, PipelineRecorder, PlainRun
from .error_model import Array, ErrorModel

SENSITIVITY_AT = (0.04, 0.1, 0.16, 0.24, 0.34, 0.48, 0.64, 0.84, 0.98)
"""Shares of a run at which its sensitivity is measured; it falls by orders of magnitude, most of them early."""


LEARNED_EVERY = (2, 3, 5)
"""Distances from full step to full step at which an adapter's errors are measured."""


_NUMBERS = 512


_FLOOR = 1e-3


Progress = Callable[[str], None]


def measure(
    pipe: Any,
    prompts: Sequence[str],
    multiples: Sequence[int] = (2, 4),
    seed: int = 0,
    progress: Progress = lambda text: None,
    adapter: Adapter | None = None,
    **call: Any,
) -> ErrorModel:
    """Measures what :func:`~ddit_rt.fitting.search.find_schedule` needs; one measurement serves any number of searches.

    Args:
        pipe, prompts, seed, progress, call: As for :func:`fit_schedule`.
        multiples: Of the coarse steps.
        adapter: What they run; None for delta, which is measured in any case.
    """
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    check_kinds(multiples)
    tracer = PipelineRecorder(pipe, call)
    sketch: _Sketch | None = None
    full: list[torch.Tensor] = []
    floor: list[float] = []
    coarse: dict[int, list[torch.Tensor]] = {k: [] for k in multiples}
    shares: dict[int, float] = {}
    left: dict[int, list[Errors]] = {k: [] for k in multiples if adapter is not None}
    gains: list[list[float]] = []
    for i, prompt in enumerate(prompts):
        progress(f"plain run: {prompt}")
        trace = tracer.plain(prompt, seed + i)
        predictions = [tracer.canonical(trace, output) for output in trace.outputs]
        sketch = sketch or _Sketch(predictions[0].numel())
        full.append(torch.stack([sketch(p) for p in predictions]))
        floor.append(_FLOOR**2 * float(trace.latents[-1].float().square().mean()))
        for k in multiples:
            progress(f"{k}p along it: {prompt}")
            found, shares[k] = tracer.coarse(trace, k, sketch)
            coarse[k].append(torch.stack(found))
            if adapter is None:
                continue
            for every in LEARNED_EVERY:
                errors, shares[k] = tracer.learned(trace, adapter, k, every)
                left[k].append(errors)
        progress(f"sensitivity: {prompt}")
        at = _places(trace.steps)
        gains.append([_gain(tracer, trace, t) for t in at])
    # errors grow by factors, so it is factors that are averaged, and drawn between the places where they were measured
    logs = np.log(np.maximum(np.array(gains), 1e-3)).mean(0)
    return ErrorModel(
        sigmas=trace.sigmas.numpy(),
        full=torch.stack(full, 1).numpy(),
        coarse={k: torch.stack(found, 1).numpy() for k, found in coarse.items()},
        shares=shares,
        sensitivity=np.exp(np.interp(np.arange(trace.steps), at, logs)),
        transformers=tuple(trace.transformers),
        floor=np.array(floor),
        left={k: _left(found, trace.steps) for k, found in left.items()},
        probes=adapter is None,
    )


def check_kinds(kinds: Sequence[int]) -> None:
    """Refuses kinds of steps that do not exist.

    Raises:
        ConfigError: naming it.
    """
    for kind in kinds:
        if kind != SKIP and kind not in SUPPORTED_MULTIPLES:
            raise ConfigError(f"kinds={list(kinds)}: {kind} is none of {SUPPORTED_MULTIPLES}, nor {SKIP}.")


def _places(steps: int) -> list[int]:
    if steps < 4:
        raise ConfigError(f"num_inference_steps={steps}: too few to choose from; 4 at least.")
    return sorted({min(max(round(share * steps), 2), steps - 1) for share in SENSITIVITY_AT})


def _gain(tracer: PipelineRecorder, trace: PlainRun, t: int) -> float:
    """By how much the run multiplies the error that a skipped step at ``t`` makes."""
    before = PredictionHistory()
    for i in range(t):
        before.add_run(float(trace.sigmas[i]), trace.outputs[i])
    error = before.forecast(float(trace.sigmas[t])) - trace.outputs[t]
    made = abs(float(trace.sigmas[t + 1] - trace.sigmas[t])) * float(error.square().mean().sqrt())
    if made == 0:
        return 1.0
    return float((tracer.disturbed(trace, t, error) - trace.latents[-1].float()).square().mean().sqrt()) / made


def _left(found: Sequence[Errors], steps: int) -> Array:
    """(S, G): what the adapter leaves of a line's error; drawn between the steps where it was measured."""
    reach = max(distance for errors in found for _, distance in errors)
    table = np.ones((steps, reach), np.float32)
    for distance in range(1, reach + 1):
        sums: dict[int, NDArray[np.float64]] = {}
        for errors in found:
            for (step, since), pair in errors.items():
                if since == distance:
                    sums[step] = sums.get(step, np.zeros(2)) + pair
        at = sorted(sums)
        shares = [float(np.sqrt(sums[step][0] / max(sums[step][1], 1e-30))) for step in at]
        table[:, distance - 1] = np.interp(np.arange(steps), at, shares)
    return table


class _Sketch:
    """Sums of randomly signed entries: few numbers whose mean square is, on average, that of all entries."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._count = min(_NUMBERS, size)
        self._bucket = torch.randint(self._count, (size,), generator=generator)
        self._sign = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0
        self._scale = (self._count / size) ** 0.5

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.flatten().float().cpu() * self._sign
        return torch.zeros(self._count).index_add(0, self._bucket, flat) * self._scale
