"""Latent increments, taken inside the scheduler's step in float32.

Rounding latents to bfloat16 gives their third difference a standard deviation of several times the default τ, so the
increment Δz = z_out - z_in has to be known before the scheduler casts its result to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def step_with_increment(
    step: Callable[..., Any],
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor]:
    """Runs ``scheduler.step`` and returns its result with the float32 increment of the latent.

    In float32 the result is the scheduler's own, bit for bit. In lower precision the Euler increment is computed from
    the sigmas and the result is again the scheduler's own; other schedulers run their arithmetic in float32, and only
    the new sample is cast back.

    Args:
        step: The scheduler's own (unpatched) bound ``step``.
        scheduler: The scheduler that owns it.
        model_output: Prediction, any float dtype, the shape of ``sample``.
        timestep: As the pipeline passes it.
        sample: Latent before the step.

    Returns:
        The scheduler's result and Δz, float32, the shape of ``sample``.
    """
    if _is_plain_euler(scheduler, args, kwargs) and model_output.dtype != torch.float32:
        result = step(model_output, timestep, sample, *args, **kwargs)
        index = scheduler.step_index - 1
        return result, (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * model_output.float()

    half = {torch.float16, torch.bfloat16}
    dtype = model_output.dtype if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else sample.dtype
    if dtype in half:
        model_output, sample = model_output.float(), sample.float()
    result = step(model_output, timestep, sample, *args, **kwargs)
    new = result[0] if isinstance(result, tuple) else result.prev_sample
    increment = new.float() - sample.float()
    if dtype in half:
        new = new.to(dtype)
        if isinstance(result, tuple):
            result = (new, *result[1:])
        else:
            result.prev_sample = new
    return result, increment


def _is_plain_euler(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the step is z + (σ_next - σ)·v with one σ for all tokens and no added noise."""
    return (
        isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        and not scheduler.config.stochastic_sampling
        and kwargs.get("per_token_timesteps") is None
        and len(args) < 6  # fewer arguments than would reach per_token_timesteps by position
    )
