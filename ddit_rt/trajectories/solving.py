"""A pipeline's flow integrated by another solver, on the noise levels of its own scheduler, read as one likes.

The pipeline goes on as it is. For the length of a ``with`` block its scheduler is exchanged for a copy that computes
its noise levels as ever, so that shifts by resolution (FLUX), fixed shifts (Wan), Karras levels and starts from a
picture are those of the plain run; those levels, of a run from a picture those from its start on, are then refined or
spaced anew, and the steps between them are made by a solver of diffusers. Every level is passed on to the model
exactly: UniPC and DPM-Solver++ as they come round timesteps to whole numbers, which moves every evaluation by up to a
thousandth of the noise range.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ..errors import ConfigError
from ..pipeline import restore
from ..runtime import MethodPatch, installed
from ..schedule import level_at, noise_setting, place_evaluations, predicts_flow

Respace = Callable[[torch.Tensor], torch.Tensor]
"""Noise levels float64 (S + 1,), falling, the end included -> other levels of the same kind, (S' + 1,)."""

BELOW_ONE = 1 - 1e-6
"""Largest σ of solvers that count in log(signal / noise), which is infinite at 1; it is diffusers' own margin."""

_KNOWN = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    DPMSolverMultistepScheduler,
)


@dataclass(frozen=True)
class Solver:
    """How steps between noise levels are made.

    Attributes:
        make: A scheduler of diffusers that predicts a flow; only its ``step`` is used.
        order: Model evaluations of every step but the last, which takes one.
        limit: The largest σ that it can take; the model is evaluated at the exact one all the same.
    """

    make: Callable[[], Any]
    order: int = 1
    limit: float = 1.0

    def evaluations(self, steps: int) -> int:
        """Model evaluations of a run of so many steps, those of guidance not counted."""
        return self.order * (steps - 1) + 1


def refined(levels: torch.Tensor, factor: int) -> torch.Tensor:
    """Levels (S + 1,) with every interval cut into ``factor`` equal ones, (S * factor + 1,)."""
    steps = len(levels) - 1
    return _at(levels, [i / factor for i in range(steps * factor + 1)])


def respaced(levels: torch.Tensor, power: float) -> torch.Tensor:
    """As many levels, read off the curve through ``levels`` at u^power, u even from 0 (noise) to 1.

    A power above 1 puts more of them where there is most noise; at 1 they are the same, bit for bit.

    Raises:
        ConfigError: the power is not above 0.
    """
    if not power > 0:
        raise ConfigError(f"spacing={power!r}: a number above 0; 1 leaves the noise levels as they are.")
    if power == 1:
        return levels
    steps = len(levels) - 1
    return _at(levels, [*(steps * u for u in place_evaluations(steps, power)), steps])


def _at(levels: torch.Tensor, places: Sequence[float]) -> torch.Tensor:
    curve = levels.tolist()
    return torch.tensor([level_at(curve, place) for place in places], dtype=levels.dtype)


@contextmanager
def solved_by(pipe: Any, solver: Solver, respace: Respace) -> Iterator[None]:
    """Calls of ``pipe`` run by ``solver`` for the length of a ``with`` block; then its scheduler is back, untouched.

    Args:
        pipe: A pipeline; whatever acceleration it has is taken off.
        solver: Makes the steps, in float32.
        respace: From the plain scheduler's levels for a call, its start first, to those that are used.

    Raises:
        ConfigError: the scheduler adds noise in its steps, or predicts no flow.
    """
    restore(pipe)
    check_deterministic_flow(pipe)
    own = pipe.scheduler
    scheduler, stepper = copy.deepcopy(own), solver.make()
    counts_off = "strength" in inspect.signature(pipe.__call__).parameters and hasattr(pipe, "get_timesteps")

    def set_timesteps(inner: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        scheduler.order = own.order
        inner(*args, **kwargs)
        if not counts_off:
            take_over(0)

    def get_timesteps(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A start from a picture, counted off on the plain levels; what is a whole number of them need not be one of
        finer ones, and not every pipeline counts in those."""
        found = inner(*args, **kwargs)
        if len(found[0]) == 0:  # no step is left to make, which is the pipeline's to say
            return found
        take_over(len(scheduler.timesteps) - len(found[0]))
        if scheduler.begin_index is not None:
            scheduler.set_begin_index(0)
        return scheduler.timesteps, len(scheduler.timesteps)

    def take_over(start: int) -> None:
        """Puts the levels that are used, and the solver, in place of the scheduler's own from ``start`` on."""
        device = scheduler.timesteps.device
        # a scheduler of two evaluations a step lists its levels twice
        levels = respace(torch.unique_consecutive(scheduler.sigmas[start:].double().cpu()))
        begin, middle, end = levels[:1], levels[1:-1].repeat_interleave(solver.order), levels[-1:]
        sigmas = torch.cat([begin, middle, end]).float()
        # before a step of several evaluations each of them is announced, the first step's first one too
        times = torch.cat([begin, middle]).float() * scheduler.config.num_train_timesteps
        scheduler.sigmas, scheduler.timesteps = sigmas, times.to(device)
        scheduler.num_inference_steps, scheduler.order = len(times), solver.order
        stepper.set_timesteps(len(levels) - 1)
        stepper.sigmas, stepper.timesteps = sigmas.clamp(max=solver.limit), scheduler.timesteps
        stepper.num_inference_steps = len(times)

    def set_begin_index(inner: Callable[[int], None], begin_index: int = 0) -> None:
        inner(begin_index)
        stepper.set_begin_index(begin_index)

    def step(
        inner: Callable[..., Any],
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        (latent,) = stepper.step(model_output.float(), timestep, sample.float(), return_dict=False)
        # what asks the scheduler where it is, as image-to-image and recorders do
        scheduler._step_index = stepper.step_index
        latent = latent.to(sample.dtype)
        return _Output(latent) if return_dict else (latent,)

    handlers: dict[str, Callable[..., Any]] = {
        "set_timesteps": set_timesteps,
        "set_begin_index": set_begin_index,
        "step": step,
    }
    patches = [MethodPatch(scheduler, name, handler) for name, handler in handlers.items()]
    if counts_off:
        patches.append(MethodPatch(pipe, "get_timesteps", get_timesteps))
    try:
        pipe.scheduler = scheduler
        with installed(patches):
            yield
    finally:
        pipe.scheduler = own


@dataclass
class _Output:
    """What a scheduler's step returns unless a tuple is asked for."""

    prev_sample: torch.Tensor


def check_deterministic_flow(pipe: Any) -> None:
    """Refuses pipelines whose picture is not the end of an ordinary differential equation of a flow.

    Raises:
        ConfigError: names the scheduler, what is wrong with it, and what to do.
    """
    scheduler = pipe.scheduler
    name = f"{type(pipe).__name__} with {type(scheduler).__name__}"
    way_out = "Give the pipeline a FlowMatchEulerDiscreteScheduler, or leave solvers and the converged picture out."
    if not isinstance(scheduler, _KNOWN):
        known = ", ".join(kind.__name__ for kind in _KNOWN)
        raise ConfigError(f"{name} cannot be run by another solver, as it can with {known}. {way_out}")
    noise = noise_setting(scheduler)
    if noise:
        raise ConfigError(f"{name} and {noise} adds noise in every step: it has no limit. {way_out}")
    if not predicts_flow(scheduler):
        raise ConfigError(f"{name} predicts no flow from σ = 1 to 0. {way_out}")
