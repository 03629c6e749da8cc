"""The noise process a model was trained on, and the way between its own terms and those of a flow.

Everything here speaks of flow states z = (1 - σ)x + σn and velocities v = n - x. The states of a variance-preserving
process, y = αx + βn with α² + β² = 1 (β as σ is called there), are flow states up to a scale:
y/(α + β) is the one with σ = β/(α + β). The scale follows from σ alone: S = α + β = 1/√((1-σ)² + σ²).
So a step of DDIM (arXiv 2010.02502) is Euler's step of the flow, and what holds for flows holds for such models.
What they predict is one number of the pair (x, n) or a mix of the two, with the other known from the state:

- ε-prediction is n itself: v = (n - z)/(1 - σ), n = z + (1 - σ)v;
- v-prediction (arXiv 2202.00512) is αn - βx: v = S·u + S²(2σ - 1)z for the prediction u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .bands import Scalar

Prediction = Literal["epsilon", "v_prediction"]

THOUSAND = 1000
"""Timesteps in a time of 1, as :meth:`ddit_rt.families.Family.time_of` takes it."""


class Process(ABC):
    """How a model's latents, predictions and times follow from flow states, velocities and noise levels.

    Latents and predictions have any shape (B, C, ...), float32; ``sigma`` is the flow's noise level, a number or a
    tensor that broadcasts to them.
    """

    @abstractmethod
    def state(self, latent: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The flow state of the model's latent."""

    @abstractmethod
    def latent(self, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The model's latent of a flow state."""

    @abstractmethod
    def velocity(self, prediction: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The flow's velocity from the model's prediction at ``state``."""

    @abstractmethod
    def prediction(self, velocity: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The model's prediction that stands for ``velocity`` at ``state``."""

    @abstractmethod
    def time(self, sigma: Scalar) -> Scalar:
        """What :meth:`ddit_rt.families.Family.time_of` makes the model's timestep of; in the type of ``sigma``."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What has to be an input of a graph that is captured with the process in it."""
        return ()

    def holding(self, tensors: tuple[torch.Tensor, ...]) -> Process:
        """The same process, with :attr:`tensors` that lie elsewhere."""
        return self


class Flow(Process):
    """A flow-matching model: all is as the model has it, not a bit of it changed."""

    def state(self, latent: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        return latent

    def latent(self, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        return state

    def velocity(self, prediction: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        return prediction

    def prediction(self, velocity: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        return velocity

    def time(self, sigma: Scalar) -> Scalar:
        return sigma


FLOW = Flow()


@dataclass(frozen=True)
class VariancePreserving(Process):
    """A model of a variance-preserving process that predicts noise, or v.

    Attributes:
        predicts: ``"epsilon"`` or ``"v_prediction"``.
        levels: σ of every timestep of training, rising, (T,) float32 or float64, where the latents are.
    """

    predicts: Prediction
    levels: torch.Tensor

    def state(self, latent: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        return latent / _scale(sigma)

    def latent(self, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        return state * _scale(sigma)

    def velocity(self, prediction: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        if self.predicts == "epsilon":
            return (prediction - state) / (1 - sigma)
        scale = _scale(sigma)
        return scale * prediction + scale**2 * (2 * sigma - 1) * state

    def prediction(self, velocity: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        if self.predicts == "epsilon":
            return state + (1 - sigma) * velocity
        scale = _scale(sigma)
        return velocity / scale - scale * (2 * sigma - 1) * state

    def time(self, sigma: Scalar) -> Scalar:
        """Linear in σ between two timesteps of training; a level below the first of them is told as the first."""
        wanted = torch.as_tensor(sigma, dtype=self.levels.dtype, device=self.levels.device)
        above = torch.searchsorted(self.levels, wanted.contiguous()).clamp(1, len(self.levels) - 1)
        # not by indexing: that would read a 0-dim index on the host
        low, high = self.levels.take(above - 1), self.levels.take(above)
        step = (above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)) / THOUSAND
        return step if isinstance(sigma, torch.Tensor) else float(step)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.levels,)

    def holding(self, tensors: tuple[torch.Tensor, ...]) -> VariancePreserving:
        return replace(self, levels=tensors[0])


def _scale(sigma: Scalar) -> Scalar:
    """S = α + β at the flow's σ."""
    scale: Scalar = ((1 - sigma) ** 2 + sigma**2) ** -0.5
    return scale
