"""Measures along plain runs what the search needs: predictions, coarse outputs, costs, sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError
from ..granularity import Adapter, PredictionHistory
from ..multiples import ALL_MULTIPLES, SKIP
from ..trajectories import (
    AdapterErrors,
    Prompt,
    Trajectory,
    adapter_errors,
    call_with,
    coarse_predictions,
    last_latent_with_error,
    name_of,
    record_trajectory,
)
from .error_model import Array, ErrorModel

SENSITIVITY_AT = (0.04, 0.1, 0.16, 0.24, 0.34, 0.48, 0.64, 0.84, 0.98)
"""Shares of a run at which its sensitivity is measured; it falls by orders of magnitude, most of them early."""

ADAPTER_EVERY = (2, 3, 5)
"""Distances from full step to full step at which an adapter's errors are measured."""

_NUMBERS = 512  # that a prediction is reduced to
_FLOOR = 1e-3  # root mean square, of the last latent's, below which an error does not count

Progress = Callable[[str], None]


def measure(
    pipe: Any,
    prompts: Sequence[Prompt],
    multiples: Sequence[int] = (2, 4),
    seed: int = 0,
    progress: Progress = lambda text: None,
    adapter: Adapter | None = None,
    finer: int = 1,
    **call: Any,
) -> ErrorModel:
    """Measures what :func:`~ddit_rt.fitting.search.find_schedule` needs; one measurement serves any number of searches.

    Args:
        pipe, prompts, seed, progress, call: As for :func:`fit_schedule`.
        multiples: Of the coarse steps.
        adapter: What they run; None for delta, which is measured in any case.
        finer: How many times as many steps to measure along, so that evaluations can lie between the call's own noise
            levels; above 1 without multiples.

    Raises:
        ConfigError: a multiple is unknown or cannot be run here, there is no prompt, prompts differ in the size of the
            latent or in noise levels, or there are too few steps.
        UnsupportedPipelineError: the pipeline, or this way to call it, cannot run coarsely.
        AdapterMismatchError: the adapter was made for another model, or lacks one of the multiples.
    """
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    check_kinds(multiples)
    calls = [call_with(prompt, call) for prompt in prompts]
    sketch: _Sketch | None = None
    first: Trajectory | None = None
    full: list[torch.Tensor] = []
    floor: list[float] = []
    coarse: dict[int, list[torch.Tensor]] = {k: [] for k in multiples}
    shares: dict[int, float] = {}
    errors: dict[int, list[AdapterErrors]] = {k: [] for k in multiples if adapter is not None}
    gains: list[list[float]] = []
    for i, prompt in enumerate(prompts):
        name, arguments = name_of(prompt, i), calls[i]
        progress(f"plain run: {name}")
        coarser = record_trajectory(pipe, seed + i, **arguments)
        first = first or coarser
        _check_alike(coarser, first, name, name_of(prompts[0], 0))
        trajectory = coarser
        if finer > 1:
            progress(f"{finer} times as many steps: {name}")
            count = {"num_inference_steps": finer * coarser.steps}
            trajectory = record_trajectory(pipe, seed + i, **{**arguments, **count})
        predictions = [trajectory.canonical(output) for output in trajectory.outputs]
        sketch = sketch or _Sketch(predictions[0].numel())
        full.append(torch.stack([sketch(p) for p in predictions]))
        floor.append(_FLOOR**2 * float(trajectory.latents[-1].float().square().mean()))
        for k in multiples:
            progress(f"{k}p along it: {name}")
            found, shares[k] = coarse_predictions(pipe, trajectory, k, sketch)
            coarse[k].append(torch.stack(found))
            if adapter is None:
                continue
            for every in ADAPTER_EVERY:
                made, shares[k] = adapter_errors(pipe, trajectory, adapter, k, every)
                errors[k].append(made)
        progress(f"sensitivity: {name}")
        at = _places(coarser.steps)
        gains.append([_gain(pipe, coarser, t) for t in at])
    # errors grow by factors, so it is factors that are averaged, and drawn between the places where they were measured
    logs = np.log(np.maximum(np.array(gains), 1e-3)).mean(0)
    # noise levels fall from step to step, and np.interp wants its places rising
    measured = -coarser.sigmas.numpy()[at]
    sensitivity = np.exp(np.interp(-trajectory.sigmas.numpy()[:-1], measured, logs))
    return ErrorModel(
        sigmas=trajectory.sigmas.numpy(),
        full=torch.stack(full, 1).numpy(),
        coarse={k: torch.stack(found, 1).numpy() for k, found in coarse.items()},
        shares=shares,
        sensitivity=sensitivity,
        transformers=tuple(trajectory.transformers),
        floor=np.array(floor),
        adapter_residual={k: _adapter_residual(found, trajectory.steps) for k, found in errors.items()},
        probes=adapter is None,
    )


def check_kinds(kinds: Sequence[int], multiples: Sequence[int] = ALL_MULTIPLES) -> None:
    """Refuses kinds of steps that do not exist, or that a model whose ``multiples`` are given cannot make.

    Raises:
        ConfigError: naming it.
    """
    for kind in kinds:
        if kind != SKIP and kind not in multiples:
            raise ConfigError(f"kinds={list(kinds)}: {kind} is none of {tuple(multiples)}, nor {SKIP}.")


def _check_alike(one: Trajectory, first: Trajectory, name: str, first_name: str) -> None:
    """Refuses runs along which no common schedule can be measured.

    Raises:
        ConfigError: naming the prompt and what differs.
    """
    size, wanted = (tuple(run.canonical(run.outputs[0]).shape) for run in (one, first))
    # a picture on its side has as much to tell
    if (size[0], math.prod(size)) != (wanted[0], math.prod(wanted)):
        raise ConfigError(
            f"prompts: {name!r} makes latents (B, C, F, H, W) of {size}, {first_name!r} of {wanted}. Fit to calls of "
            "one height, width, number of frames and batch; the schedule serves sizes near it."
        )
    if not torch.equal(one.sigmas, first.sigmas):
        begins = [f"{run.steps} steps from {float(run.sigmas[0]):.4g}" for run in (one, first)]
        raise ConfigError(
            f"prompts: {name!r} has other noise levels ({begins[0]}) than {first_name!r} ({begins[1]}). Fit to calls "
            "of one size and strength, without sigmas or timesteps of their own."
        )


def _places(steps: int) -> list[int]:
    if steps < 4:
        raise ConfigError(f"num_inference_steps={steps}: too few to choose from; 4 at least.")
    return sorted({min(max(round(share * steps), 2), steps - 1) for share in SENSITIVITY_AT})


def _gain(pipe: Any, trajectory: Trajectory, t: int) -> float:
    """By how much the run multiplies the error that a skipped step at ``t`` makes."""
    before = PredictionHistory()
    for i in range(t):
        before.add_run(float(trajectory.sigmas[i]), trajectory.outputs[i])
    error = before.forecast(float(trajectory.sigmas[t])) - trajectory.outputs[t]
    made = abs(float(trajectory.sigmas[t + 1] - trajectory.sigmas[t])) * float(error.square().mean().sqrt())
    if made == 0:
        return 1.0
    ended = last_latent_with_error(pipe, trajectory, t, error) - trajectory.latents[-1].float()
    return float(ended.square().mean().sqrt()) / made


def _adapter_residual(found: Sequence[AdapterErrors], steps: int) -> Array:
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
