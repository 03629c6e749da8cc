"""The converged picture: where a pipeline's flow leads from a noise, whatever the solver.

A pipeline with a finite number of steps only approximates it. Euler's 50 steps on the demo model end about 30 dB away,
so closeness to them and closeness to what the model says are two things. The run here is 58 to 65 dB from one of twice
its steps.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from diffusers import UniPCMultistepScheduler

from ..errors import ConfigError
from .generation import Outcome, timed_call
from .solving import BELOW_ONE, Solver, refined, respaced, solved_by

STEPS = 100
"""Steps of a converged run, at least."""

SPACING = 1.4
"""See :func:`~ddit_rt.trajectories.solving.respaced`. With the plain spacing, so many steps end 44 dB from twice as
many where a prompt's picture is decided by little; with this one, 58 dB."""

UNIPC = Solver(
    lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), limit=BELOW_ONE
)
"""UniPC (arXiv 2302.04867) of second order: third gains nothing at this many steps."""


def generate_converged(pipe: Any, seed: int, *, least_steps: int = STEPS, **call: Any) -> Outcome:
    """Calls ``pipe`` with its flow solved to convergence, from the noise that ``seed`` gives.

    The noise levels of the plain call are cut until there are enough, more of them are put where there is most noise,
    and UniPC makes the steps. A run from a picture begins where the plain one does; there they are only cut.

    Args:
        pipe: A pipeline; whatever acceleration it has is taken off, and its scheduler is the same afterwards.
        seed: Of a CPU generator, as for :func:`generate`.
        least_steps: Steps to make at least.
        **call: Arguments of the pipeline, as for the plain run that is compared.

    Raises:
        ConfigError: the pipeline's scheduler adds noise or predicts no flow, or ``least_steps`` is below 1.
    """
    if least_steps < 1:
        raise ConfigError(f"least_steps={least_steps}: at least 1.")
    parameters = inspect.signature(pipe.__call__).parameters
    factor = math.ceil(least_steps / call.get("num_inference_steps", parameters["num_inference_steps"].default))
    power = 1.0 if "strength" in parameters else SPACING
    with solved_by(pipe, UNIPC, lambda levels: respaced(refined(levels, factor), power)):
        return Outcome(*timed_call(pipe, seed, call), None)
