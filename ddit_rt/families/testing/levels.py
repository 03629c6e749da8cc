"""Euler's method between noise levels of one's own choice, of a flow or of a variance-preserving process (DDIM).

The chosen levels are those of a full run and, for each of them, the level σ' = sσ/k of its low band, at which a run of
the small picture goes the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ...granularity import VariancePreserving, bands
from ...schedule import preserves_variance, training_levels

MULTIPLE = 2
_FLOW = (1.0, 0.8, 0.5, 0.2)
_NOISE = (0.95, 0.8, 0.5, 0.2)  # noise cannot be predicted from noise alone
# DDIM steps as far as it has timesteps of training to a step; the low band's lie between those of the full run
_FULL, _LOW = (900, 650, 400, 150), (800, 550, 300, 50)


@dataclass(frozen=True)
class Course:
    """A run between given levels, at full size or of the small picture.

    Attributes:
        scheduler: Makes the steps.
        levels: Noise levels of its steps, a flow's.
        process: Of its latents; None for a flow's.
    """

    scheduler: Any
    levels: tuple[float, ...]
    process: VariancePreserving | None = None

    def state(self, latent: torch.Tensor, index: int) -> torch.Tensor:
        """The flow state of a latent at the beginning of a step."""
        return latent if self.process is None else self.process.state(latent, self.levels[index])

    def latent(self, state: torch.Tensor, index: int) -> torch.Tensor:
        """The latent of a flow state at the beginning of a step."""
        return state if self.process is None else self.process.latent(state, self.levels[index])


def courses(scheduler: Any) -> tuple[Course, Course]:
    """A full run and the small picture's run that is its low band, for models of a pipeline with ``scheduler``."""
    if not preserves_variance(scheduler):
        both = (Course(_between(FlowMatchEulerDiscreteScheduler(), at), at) for at in (_FLOW, _low(_FLOW)))
        return next(both), next(both)
    full, low = _NOISE, _low(_NOISE)
    knots = sorted([(0, 0.01), *zip(_LOW, low), *zip(_FULL, full), (999, 0.99)])
    curve = np.interp(np.arange(1000), [t for t, _ in knots], [sigma for _, sigma in knots])
    signal = (1 - curve) ** 2 / ((1 - curve) ** 2 + curve**2)
    betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
    prediction = scheduler.config.prediction_type
    made = []
    for levels, timesteps in ((full, _FULL), (low, _LOW)):
        ddim = DDIMScheduler(trained_betas=betas.tolist(), prediction_type=prediction, clip_sample=False)
        process = VariancePreserving(prediction, training_levels(ddim))
        made.append(Course(_through(ddim, timesteps), levels, process))
    return made[0], made[1]


def _low(levels: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(bands.low_scale(sigma, MULTIPLE)) * sigma / MULTIPLE for sigma in levels)


def _between(scheduler: Any, levels: tuple[float, ...]) -> Any:
    def place() -> None:
        scheduler.sigmas = torch.tensor([*levels, 0.0])
        scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps

    return _placing(scheduler, place)


def _through(scheduler: Any, timesteps: tuple[int, ...]) -> Any:
    def place() -> None:
        scheduler.timesteps = torch.tensor(timesteps)

    return _placing(scheduler, place)


def _placing(scheduler: Any, place: Callable[[], None]) -> Any:
    """The scheduler, which places its steps by ``place`` from now on, whatever it is asked for."""
    own = scheduler.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        place()

    # pipelines look at the signature for the arguments they may give
    set_timesteps.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    scheduler.set_timesteps = set_timesteps
    return scheduler
