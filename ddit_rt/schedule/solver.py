"""How the latent moves over steps that the model skips: lines through its predictions, integrated, then corrected.

A flow model's latent follows dz/dσ = v(z, σ). Between two model runs only a forecast of v is known: the line through
the last two predictions. When the next full step brings the true one, the gap is integrated again along the parabola
through the predictions at both ends and the one before, and the latent is moved by the difference before the step goes
on. That is the predictor-corrector scheme of multistep solvers (Adams-Bashforth of 2nd, Adams-Moulton of 3rd order with
any spacing; UniPC, arXiv 2302.04867, corrects likewise in log-SNR). It calls no model.

Such polynomials hold over short ways only. Where evaluations lie far apart, the slope between two of them says little
of what comes, and the bend through three as little: of eight evaluations of a guided run, the best forecast is nearly
the last prediction. So slope and bend count by a share that falls with the way that they are taken from, see
:func:`trust`; it goes to 1 with the square of the spacing, which leaves the scheme its order.

What a gap is integrated to depends on the reference. *Plain*: to the sum that the scheduler's own Euler steps would
make, so that the run ends where the plain pipeline ends. *Converged*: to the integral, so that it ends where infinitely
many steps would. *Between* them: Euler's steps read a prediction at their beginning, the integral of a line reads it in
their middle, and a run that reads it a share of the way there ends, to first order, that share of the way from the
plain to the converged picture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ..errors import ConfigError
from .evolution import latent_of, with_latent
from .noise import noise_setting, predicts_flow, preserves_variance

_SOLVERS_OF_THE_FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)


SPAN = 1 / 6
"""The way over which a slope or a bend counts half; docs/how-it-works.md has how it was found."""


def way(progress: float) -> float:
    """How far along a run is, so that equal ways are about equally hard to forecast: u^(2/3).

    Predictions turn faster at high noise. In this measure evaluations by the rule of :mod:`.placement` are about evenly
    spaced, so that its runs count every slope about alike.

    Args:
        progress: u, the share of the run's steps that are made, 0 to 1.
    """
    return progress ** (2 / 3)


def trust(span: float) -> float:
    """The share by which a slope or a bend counts, 1 / (1 + (span / SPAN)²).

    Args:
        span: The way from the oldest prediction that it is taken from to where it is used.
    """
    return 1 / (1 + (span / SPAN) ** 2)


class Ran(Enum):
    """What a step's prediction comes from."""

    FULL = "the model at its own patch size"
    COARSE = "the model on coarse tokens"
    CACHED = "what earlier steps left: a cache's blocks, or a coarse path that calls no model"
    SKIPPED = "a forecast"


def solves_the_flow(scheduler: Any) -> bool:
    """Whether a scheduler's steps approximate dz/dσ = v and add no noise, so that a gap can be integrated for it."""
    known = type(scheduler).__name__ in _SOLVERS_OF_THE_FLOW and predicts_flow(scheduler)
    return known and not noise_setting(scheduler)


def follows_the_flow(scheduler: Any) -> bool:
    """Whether a scheduler's steps approximate dz/dσ = v once they are written in flow terms.

    Those of a variance-preserving process do; DDIM's are Euler's. Not where it changes what the model predicts, or
    where its timesteps are spaced so that a step leads elsewhere than where the next one begins.

    Args:
        scheduler: With the call's timesteps set.
    """
    if not preserves_variance(scheduler):
        return solves_the_flow(scheduler)
    config = scheduler.config
    if config.get("clip_sample") or config.get("thresholding"):
        return False
    if not isinstance(scheduler, DDIMScheduler):
        return True
    steps = scheduler.timesteps[:-1] - scheduler.timesteps[1:]
    return bool((steps == config.num_train_timesteps // scheduler.num_inference_steps).all())


def check_reference(reference: str, scheduler: Any, toward_converged: float = 0.0) -> None:
    """Refuses to aim at the converged picture, or nearer to it, where a run has none or is there already.

    Args:
        reference, toward_converged: Settings of :class:`~ddit_rt.DDiTConfig`.
        scheduler: Of the pipeline.

    Raises:
        ConfigError: with the schedulers that can.
    """
    name = type(scheduler).__name__
    if reference == "converged" and not solves_the_flow(scheduler):
        raise ConfigError(
            f"reference='converged': {name} adds noise, predicts no flow or is unknown: no converged picture is known. "
            f"Use one of {', '.join(_SOLVERS_OF_THE_FLOW)} with a model that predicts a flow, or reference='plain'."
        )
    if toward_converged and not (solves_the_flow(scheduler) and _makes_eulers_steps(scheduler)):
        raise ConfigError(
            f"toward_converged={toward_converged:g}: {name} makes no Euler steps of a flow, whose error this takes a "
            "share of away. Use FlowMatchEulerDiscreteScheduler, or leave it 0."
        )


def _makes_eulers_steps(scheduler: Any) -> bool:
    return isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, DDIMScheduler))


class _Run(NamedTuple):
    """One model run: noise level, way along the run, prediction (float32), and whether it was on coarse tokens."""

    sigma: float
    way: float
    prediction: torch.Tensor
    coarse: bool


class FlowSolver:
    """The latent's way through one pipeline call.

    Euler steps that aim at the plain picture itself and have a prediction stay the scheduler's own, bit for bit, until
    a gap has been closed, and again between gaps. Any other solver of diffusers' keeps a history of predictions that it
    assumes to be true, so from the first skipped step on its steps are taken over by ours, of second order too; its
    counters go on.

    Args:
        scheduler: Of the pipeline; :func:`follows_the_flow`.
        sigmas: Noise levels of the call's S steps and the one after them.
        toward: Where to aim: 0 is the scheduler's own picture, 1 the converged one, and what lies between them can be
            had of Euler's steps. Other solvers' own picture is taken for the converged one.

    Attributes:
        missed: What the forecast for the last step missed, if a gap ended there: root mean square of the difference
            over that of the prediction, the largest of the batch, a 0-dim float32 tensor where the latents are.
    """

    def __init__(self, scheduler: Any, sigmas: Sequence[float], toward: float) -> None:
        self.missed: torch.Tensor | None = None
        self._sigmas = sigmas
        self._euler = _makes_eulers_steps(scheduler)
        self._toward = toward if self._euler else 1.0
        self._ours = toward > 0
        self._runs: list[_Run] = []  # the last two, oldest first
        self._source: Hashable = None
        # since the last of them: increments made; Σ h, Σ h·x and Σ h·x², x = σ - σ_run where they looked; skipped?
        self._made: torch.Tensor | None = None
        self._moments = (0.0, 0.0, 0.0)
        self._skipped = False
        # what rounding to the model's dtype has left of the latent
        self._remainder: torch.Tensor | None = None

    def step(
        self,
        index: int,
        ran: Ran,
        source: Hashable,
        output: torch.Tensor,
        sample: torch.Tensor,
        scheduler_step: Callable[[torch.Tensor], tuple[Any, torch.Tensor]],
    ) -> tuple[Any, torch.Tensor]:
        """Moves the latent over one step.

        Args:
            index: Of the step, from 0.
            ran: What ``output`` comes from.
            source: What makes up the prediction: which transformer, and with which guidance. No line is drawn from one
                to another.
            output: Prediction with guidance applied, any float dtype, the shape of ``sample``.
            sample: Latent before the step.
            scheduler_step: Runs the scheduler from a latent; its result, and the float32 increment.

        Returns:
            The scheduler's result, with the latent moved on, and the float32 increment.
        """
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        dtype, latent = sample.dtype, sample
        self.missed = None
        if self._remainder is not None and self._remainder.shape == sample.shape:
            latent = sample.float() + self._remainder
        if source != self._source:
            self._runs, self._source = [], source
        if ran is Ran.FULL:
            latent = self._corrected(latent, index, output)
        foretold = ran in (Ran.SKIPPED, Ran.CACHED)
        if not foretold or not self._runs:
            # guidance that ends on a skipped step leaves a forecast to start from
            self._begin_gap(_Run(sigma, self._way(index), output.detach().float(), ran is not Ran.FULL))
        if foretold:
            self._skipped = True
            self._ours |= not self._euler
        h = following - sigma
        part = self._toward / 2  # where in the step its prediction is read
        place = sigma + part * h
        if self._ours or ran is Ran.SKIPPED:
            # the scheduler counts on; where its own step leads is not used
            result, _ = scheduler_step(sample)
            increment = h * self._forecast(place, self._way(index + part))
            moved = latent.float() + increment
            rounded = moved.to(dtype)
            self._remainder = None if dtype == torch.float32 else moved - rounded.float()
            result = with_latent(result, rounded)
        else:
            self._remainder = None
            result, increment = scheduler_step(latent)
            if latent is not sample:
                result = with_latent(result, latent_of(result).to(dtype))
        self._made = increment if self._made is None else self._made + increment
        self._add_moments(h, place - self._runs[-1].sigma)
        return result, increment

    def _add_moments(self, h: float, x: float) -> None:
        # of x² over the step: what lies so far between its value at the beginning and its mean has more than at x
        spread = h**3 * (self._toward / 3 - self._toward**2 / 4)
        zeroth, first, second = self._moments
        self._moments = (zeroth + h, first + h * x, second + h * x * x + spread)

    def _begin_gap(self, run: _Run) -> None:
        """Takes in a model run; it replaces one at the same σ, as Heun's method makes two."""
        if self._runs and self._runs[-1].sigma == run.sigma:
            self._runs.pop()
        self._runs = [*self._runs[-1:], run]
        self._made, self._moments, self._skipped = None, (0.0, 0.0, 0.0), False

    def _way(self, index: float) -> float:
        return way(index / (len(self._sigmas) - 1))

    def _corrected(self, latent: torch.Tensor, index: int, output: torch.Tensor) -> torch.Tensor:
        """The latent with the gap before a step integrated again, now that the prediction at its end is known."""
        sigma, end = self._sigmas[index], self._way(index)
        if not self._runs or self._made is None or self._runs[-1].sigma == sigma:
            return latent
        if not (self._skipped or self._ours):
            return latent  # the scheduler's own steps, one after the other
        begin, _, first, _ = self._runs[-1]
        truth = output.float()
        missed = truth - self._forecast(sigma, end)
        over = tuple(range(1, truth.ndim))
        size = truth.square().mean(over).clamp_min(1e-12)
        self.missed = (missed.square().mean(over) / size).amax().sqrt()
        zeroth, moment, second = self._moments
        slope = (truth - first) / (sigma - begin)
        again = zeroth * first + moment * slope
        if len(self._runs) == 2 and not any(run.coarse for run in self._runs):
            older, from_way, before, _ = self._runs[0]
            bend = (slope - (first - before) / (begin - older)) / (sigma - older)
            again += (second - (sigma - begin) * moment) * trust(end - from_way) * bend
        return latent.float() + (again - self._made)

    def _forecast(self, sigma: float, at: float) -> torch.Tensor:
        """The prediction to expect at ``sigma`` and way ``at``, float32.

        The line through the last two model runs, its slope counted as far as it is trusted; the last run alone is a
        constant.
        """
        if len(self._runs) < 2:
            return self._runs[-1].prediction
        older, newest = self._runs
        share = trust(at - older.way) * (sigma - newest.sigma) / (newest.sigma - older.sigma)
        return newest.prediction + share * (newest.prediction - older.prediction)
