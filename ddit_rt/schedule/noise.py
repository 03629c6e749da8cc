"""What a scheduler takes the model's output for, at which noise levels its steps lie, and whether it adds noise.

Noise levels are those of a flow, z = (1 - σ)x + σn. A scheduler of a variance-preserving process, y = αx + βn with
α² + β² = 1, moves y between the levels σ = β/(α + β): its states are those of a flow up to a scale
(:class:`ddit_rt.granularity.VariancePreserving`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from ..errors import UnsupportedPipelineError

# their latents are those of the process itself, and their steps add no noise of their own accord
_VARIANCE_PRESERVING = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
)
_PREDICTIONS = ("epsilon", "v_prediction")


def predicts_flow(scheduler: Any) -> bool:
    """Whether a scheduler takes its model output for a flow (velocity), from σ = 1 to 0."""
    config = scheduler.config
    flow = type(scheduler).__name__.startswith("FlowMatch") or (
        # without flow sigmas, σ is that of a variance-exploding process
        config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    )
    return bool(flow) and not config.get("invert_sigmas") and hasattr(scheduler, "sigmas")


def preserves_variance(scheduler: Any) -> bool:
    """Whether a scheduler takes its model output for noise or v of a variance-preserving process and adds no noise."""
    config = scheduler.config
    known = isinstance(scheduler, _VARIANCE_PRESERVING) and config.get("prediction_type") in _PREDICTIONS
    return known and not config.get("use_flow_sigmas") and not noise_setting(scheduler)


def noise_setting(scheduler: Any) -> str:
    """The setting by which a scheduler adds noise in its steps, as in ``stochastic_sampling=True``; empty if none."""
    config = scheduler.config
    if config.get("stochastic_sampling"):
        return "stochastic_sampling=True"
    kind = config.get("algorithm_type")
    return f"algorithm_type={kind!r}" if str(kind).startswith("sde") else ""


def noise_of_call(scheduler: Any, call: Mapping[str, Any]) -> str:
    """What has a scheduler add noise in every step of a pipeline call: an argument, a setting or its kind; empty if
    nothing does.

    Args:
        scheduler: Of the pipeline.
        call: Arguments of its call.
    """
    eta = call.get("eta") if isinstance(scheduler, DDIMScheduler) else None
    if eta:
        return f"eta={eta:g}"
    return "FlowMatchLCMScheduler" if isinstance(scheduler, FlowMatchLCMScheduler) else noise_setting(scheduler)


def check_process(scheduler: Any, variance_preserving: bool) -> None:
    """Refuses schedulers whose steps are of no process that a model can be of.

    Args:
        scheduler: Of the pipeline.
        variance_preserving: Whether the model may predict noise or v, and not a flow only.

    Raises:
        UnsupportedPipelineError: with the setting that makes a scheduler usable.
    """
    if predicts_flow(scheduler) or (variance_preserving and preserves_variance(scheduler)):
        return
    name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if not variance_preserving:
        raise UnsupportedPipelineError(
            f"{name} does not predict a flow. Use a FlowMatch* scheduler, or one made with "
            "from_config(pipe.scheduler.config, prediction_type='flow_prediction', use_flow_sigmas=True)."
        )
    setting = noise_setting(scheduler)
    if setting:
        why = f"{setting} adds noise in every step, which no earlier step foretells"
    elif prediction not in _PREDICTIONS:
        why = f"prediction_type={prediction!r} is neither of {', '.join(map(repr, _PREDICTIONS))}"
    else:
        why = "it adds noise in its steps, which no earlier step foretells, or keeps its latents in another scale"
    known = ", ".join(kind.__name__ for kind in _VARIANCE_PRESERVING)
    raise UnsupportedPipelineError(
        f"{name} cannot be accelerated: {why}. Use one of {known}, as in "
        "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)."
    )


def levels_of(scheduler: Any) -> list[float]:
    """Noise levels of the steps that are set, and the one after them.

    Args:
        scheduler: That :func:`check_process` lets pass, with its timesteps set.
    """
    if predicts_flow(scheduler):
        return [float(sigma) for sigma in scheduler.sigmas.tolist()]
    if hasattr(scheduler, "sigmas"):
        return [sigma / (1 + sigma) for sigma in scheduler.sigmas.double().tolist()]  # β/α, as they keep it
    known, timesteps = training_levels(scheduler), scheduler.timesteps.cpu()
    # as the scheduler looks for where its last step leads
    last = int(timesteps[-1]) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    after = known[last] if last >= 0 else _level(scheduler.final_alpha_cumprod)
    return [*known[timesteps].tolist(), float(after)]


def training_levels(scheduler: Any) -> torch.Tensor:
    """Noise level of every timestep of training of a variance-preserving process, rising, float64 (T,) on the CPU."""
    return _level(scheduler.alphas_cumprod)


def _level(signal: torch.Tensor) -> torch.Tensor:
    """σ from α²."""
    alpha, beta = signal.double().cpu().sqrt(), (1 - signal.double().cpu()).sqrt()
    return beta / (alpha + beta)
