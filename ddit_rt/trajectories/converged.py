"""The converged picture: where a pipeline's flow leads from a noise, whatever the solver.

A pipeline with a finite number of steps only approximates it. Euler's 50 steps on the demo model end about 30 dB away,
so closeness to them and closeness to what the model says are two things. The run here is 60 dB and more from one of
twice its steps.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

from diffusers import UniPCMultistepScheduler

from ..errors import ConfigError
from .generation import Outcome, timed_call
from .solving import BELOW_ONE, Solver, refined, solved_by

STEPS = 100
"""Steps of a converged run, at least."""

UNIPC = Solver(
    lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), limit=BELOW_ONE
)
"""UniPC (arXiv 2302.04867) of second order: third gains nothing at this many steps."""


def generate_converged(pipe: Any, seed: int, *, least_steps: int = STEPS, **call: Any) -> Outcome:
    """Calls ``pipe`` with its flow solved to convergence, from the noise that ``seed`` gives.

    The noise levels of the plain call are cut evenly until there are enough, and UniPC makes the steps.

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
    steps = call.get("num_inference_steps", inspect.signature(pipe.__call__).parameters["num_inference_steps"].default)
    factor = math.ceil(least_steps / steps)
    with solved_by(pipe, UNIPC, partial(refined, factor=factor)):
        return Outcome(*timed_call(pipe, seed, call), None)
