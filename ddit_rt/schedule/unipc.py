"""UniPC's step without a wait for the device: what is known of the noise levels alone is computed on the host.

diffusers' ``UniPCMultistepScheduler`` keeps its noise levels on the host, and in every step copies six of them to the
device and solves a linear system there: each a wait, all of them before the next decision can be launched. The step
here does the same arithmetic in the same order, on the scheduler's own state, so that either may follow the other in a
run. On a CPU its results are diffusers' bit for bit up to order 2, and within the rounding of one sum at order 3. On a
CUDA device logarithms and quotients of the host may differ from the device's in the last bit.

Source: UniPC, arXiv 2302.04867, algorithms 1 and 2, data prediction, with the B(h) of section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

WAITS_ON = frozenset({"cuda"})
"""Device types on which diffusers' own step waits."""

# settings that say where the noise levels lie, or nothing to a step
_HARMLESS = frozenset(
    {
        "beta_end", "beta_schedule", "beta_start", "disable_corrector", "dynamic_thresholding_ratio",
        "final_sigmas_type", "flow_shift", "lower_order_final", "num_train_timesteps", "rescale_betas_zero_snr",
        "sample_max_value", "shift_terminal", "sigma_max", "sigma_min", "solver_order", "steps_offset",
        "time_shift_type", "timestep_spacing", "trained_betas", "use_beta_sigmas", "use_dynamic_shifting",
        "use_exponential_sigmas", "use_karras_sigmas",
    }
)  # fmt: skip
_NEEDED = {
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "predict_x0": (True,),
    "thresholding": (False,),
    "solver_p": (None,),
    "solver_type": ("bh1", "bh2"),
}


def without_waiting(step: Callable[..., Any], scheduler: Any, sample: torch.Tensor) -> Callable[..., Any]:
    """``step``, or in its place one of the same result that does not wait for the device.

    Args:
        step: The scheduler's own bound ``step``.
        scheduler: Any; left alone if it has a setting that is not known here.
        sample: The latent that will be stepped.
    """
    own = getattr(step, "__func__", None) is UniPCMultistepScheduler.step
    wanted = sample.device.type in WAITS_ON and sample.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return partial(unipc_step, scheduler) if own and wanted and is_known(scheduler) else step


def is_known(scheduler: Any) -> bool:
    """Whether :func:`unipc_step` does what a scheduler's own step does."""
    if type(scheduler) is not UniPCMultistepScheduler or scheduler.sigmas.device.type != "cpu":
        return False
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    known = all(config.pop(name, None) in values for name, values in _NEEDED.items())
    return known and config.keys() <= _HARMLESS and scheduler.solver_p is None and scheduler.predict_x0


def unipc_step(
    scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
) -> SchedulerOutput | tuple[torch.Tensor]:
    """A step of a scheduler that :func:`is_known`: correct the last step, then predict the next latent.

    Args:
        scheduler: Its history, counters and last sample are moved on as by its own step.
        model_output: Velocity, any float dtype, the shape of ``sample``.
        timestep: As the pipeline passes it.
        sample: Latent, float32, anywhere.
        return_dict: A ``SchedulerOutput`` instead of a tuple.

    Returns:
        The next latent, float32.
    """
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    index, order = scheduler.step_index, scheduler.config.solver_order
    clean = sample - scheduler.sigmas[index] * model_output
    if index > 0 and index - 1 not in scheduler.disable_corrector and scheduler.last_sample is not None:
        sample = _moved(scheduler, scheduler.last_sample, index - 1, scheduler.this_order, clean).to(sample.dtype)
    scheduler.model_outputs = [*scheduler.model_outputs[1:], clean]
    scheduler.timestep_list = [*scheduler.timestep_list[1:], timestep]
    left = len(scheduler.timesteps) - index if scheduler.config.lower_order_final else order
    scheduler.this_order = min(order, left, scheduler.lower_order_nums + 1)
    scheduler.last_sample = sample
    following = _moved(scheduler, sample, index, scheduler.this_order, None).to(sample.dtype)
    scheduler.lower_order_nums = min(scheduler.lower_order_nums + 1, order)
    scheduler._step_index += 1
    return SchedulerOutput(prev_sample=following) if return_dict else (following,)


def _moved(scheduler: Any, sample: torch.Tensor, index: int, order: int, truth: torch.Tensor | None) -> torch.Tensor:
    """The latent moved from the noise level of step ``index`` to the next one.

    Args:
        scheduler: Whose history ends with the clean latent that step ``index`` foretold.
        sample: Latent at that step.
        index: Of the step, from 0.
        order: Of the polynomial.
        truth: What the next step foretells, to correct with; None predicts.
    """
    rule = _rule(scheduler, index, order, truth is not None)
    newest = scheduler.model_outputs[-1]
    slopes: Any = 0
    for i, (weight, ratio) in enumerate(zip(rule.weights, rule.ratios)):
        slope = weight * ((scheduler.model_outputs[-2 - i] - newest) / ratio)
        slopes = slope if i == 0 else slopes + slope
    if truth is not None:
        slopes = slopes + rule.weights[-1] * (truth - newest)
    return rule.keep * sample - rule.pull * newest - rule.bend * slopes


class _Rule(NamedTuple):
    """How a step combines what is known, float32 numbers on the host.

    Attributes:
        keep, pull, bend: Factors of the latent, of the newest clean latent, and of the sum of slopes.
        weights: Of the slopes, newest first; in a correction the last is that of the truth.
        ratios: Distance in log-SNR of each older clean latent from the newest, over the length of the step.
    """

    keep: torch.Tensor
    pull: torch.Tensor
    bend: torch.Tensor
    weights: torch.Tensor
    ratios: list[torch.Tensor]


def _rule(scheduler: Any, index: int, order: int, corrects: bool) -> _Rule:
    begin, end = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    origin = _log_snr(begin)
    length = _log_snr(end) - origin
    older = [scheduler.sigmas[index - i] for i in range(1, order)]
    ratios = [(_log_snr(sigma) - origin) / length for sigma in older]
    decay = torch.expm1(-length)
    scale = -length if scheduler.config.solver_type == "bh1" else decay
    if order == (1 if corrects else 2):
        weights = torch.tensor([0.5])
    else:
        weights = _weights(ratios, -length, decay, scale, order if corrects else order - 1)
    alpha = 1 - end
    return _Rule(end / begin, alpha * decay, alpha * scale, weights, ratios)


def _weights(
    ratios: list[torch.Tensor], negative: torch.Tensor, decay: torch.Tensor, scale: torch.Tensor, count: int
) -> torch.Tensor:
    """The weights that make the step exact for polynomials: a linear system with the moments of the exponential."""
    if count == 0:
        return torch.empty(0)
    places = torch.stack([*ratios, torch.ones(())])[:count]
    moment, factorial, powers, moments = decay / negative - 1, 1, [], []
    for i in range(1, count + 1):
        powers.append(torch.pow(places, i - 1))
        moments.append(moment * factorial / scale)
        factorial *= i + 1
        moment = moment / negative - 1 / factorial
    return torch.linalg.solve(torch.stack(powers), torch.stack(moments))


def _log_snr(sigma: torch.Tensor) -> torch.Tensor:
    return torch.log(1 - sigma) - torch.log(sigma)
