"""The latent's move over one step by :class:`ddit_rt.schedule.FlowSolver`, for models that predict no flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..granularity import VariancePreserving
from ..schedule import FlowSolver, Ran, latent_of, with_latent

# (model output, latent) -> the scheduler's result and the float32 increment of the latent
SchedulerStep = Callable[[torch.Tensor, torch.Tensor], tuple[Any, torch.Tensor]]


def solved_step(
    solver: FlowSolver,
    process: VariancePreserving,
    levels: tuple[float, float],
    made: tuple[int, Ran, tuple[int, int]],
    output: torch.Tensor,
    sample: torch.Tensor,
    scheduler_step: SchedulerStep,
) -> tuple[Any, torch.Tensor]:
    """Moves a latent; where the solver has nothing to move, by the scheduler's own step, bit for bit.

    Args:
        solver: Of the call.
        process: Of its latents.
        levels: Noise levels before and after the step, a flow's.
        made: Index, origin and source of the step, as :meth:`FlowSolver.step` takes them.
        output: Prediction with guidance applied, any float dtype, the shape of ``sample``.
        sample: Latent before the step.
        scheduler_step: Runs the scheduler.

    Returns:
        The scheduler's result, with the latent moved on, and the float32 increment of the latent.
    """
    before, after = levels
    state = process.state(sample.float(), before)
    velocity = process.velocity(output.float(), state, before)
    results: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def step(moved: torch.Tensor) -> tuple[Any, torch.Tensor]:
        if moved is state:
            latent, prediction = sample, output
        else:
            # the velocity is what stays when a latent is moved
            latent = process.latent(moved, before).to(sample.dtype)
            prediction = process.prediction(velocity, moved, before).to(output.dtype)
        result, increment = scheduler_step(prediction, latent)
        reached = process.state(latent.float() + increment, after)
        results.append((result, increment, reached))
        return (reached,), reached - moved

    found, change = solver.step(*made, velocity, state, step)
    (result, increment, reached) = results[0]
    end = latent_of(found)
    if end is reached:
        return result, increment
    latent = process.latent(end, after)
    return with_latent(result, latent.to(sample.dtype)), latent - process.latent(end - change, before)
