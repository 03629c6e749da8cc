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

from dataclasses import dataclass
from typing import Literal

import torch

from .bands import Scalar
from .paths import Models

Prediction = Literal["epsilon", "v_prediction"]

_THOUSAND = 1000  # timesteps in a time of 1, as families take it


@dataclass(frozen=True)
class VariancePreserving:
    """How a model's latents, predictions and times follow from flow states, velocities and noise levels.

    Latents and predictions have any shape (B, C, ...), float32; ``sigma`` is the flow's noise level, a number or a
    tensor that broadcasts to them.

    Attributes:
        predicts: ``"epsilon"`` or ``"v_prediction"``.
        levels: σ of every timestep of training, rising, (T,) float32 or float64, where the latents are. What a captured
            graph reads of the process has to be among its inputs.
    """

    predicts: Prediction
    levels: torch.Tensor

    def state(self, latent: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The flow state of the model's latent."""
        return latent / _scale(sigma)

    def latent(self, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The model's latent of a flow state."""
        return state * _scale(sigma)

    def velocity(self, prediction: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The flow's velocity from the model's prediction at ``state``."""
        if self.predicts == "epsilon":
            return (prediction - state) / (1 - sigma)
        scale = _scale(sigma)
        return scale * prediction + scale**2 * (2 * sigma - 1) * state

    def prediction(self, velocity: torch.Tensor, state: torch.Tensor, sigma: Scalar) -> torch.Tensor:
        """The model's prediction that stands for ``velocity`` at ``state``."""
        if self.predicts == "epsilon":
            return state + (1 - sigma) * velocity
        scale = _scale(sigma)
        return velocity / scale - scale * (2 * sigma - 1) * state

    def time(self, sigma: Scalar) -> Scalar:
        """The timestep of training at a noise level, in thousandths, in the type of ``sigma``.

        Linear in σ between two timesteps; a level below the first of them is told as the first.
        """
        wanted = torch.as_tensor(sigma, dtype=self.levels.dtype, device=self.levels.device)
        above = torch.searchsorted(self.levels, wanted.contiguous()).clamp(1, len(self.levels) - 1)
        # not by indexing: that would read a 0-dim index on the host
        low, high = self.levels.take(above - 1), self.levels.take(above)
        step = (above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)) / _THOUSAND
        return step if isinstance(sigma, torch.Tensor) else float(step)

    def models(self, own: Models, channels: int) -> Models:
        """What takes flow states and gives velocities, of what takes the model's latents and gives its predictions.

        Args:
            own: The model's own; it takes times where paths give noise levels.
            channels: Of the latent. An adapter reads and gives more behind them, which stay as they are.
        """

        def low(state: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            prediction = own.low(self.latent(state, level), self.time(level), multiple)
            return self.velocity(prediction, state, level)

        def tokens(features: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            state = features[:, :channels]
            given = _with_first(self.latent(state, level), features)
            found = own.tokens(given, self.time(level), multiple)
            return _with_first(self.velocity(found[:, :channels], state, level), found)

        return Models(low, tokens)


def _with_first(first: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` (B, C, ...) with other first channels."""
    channels = first.shape[1]
    return first if tensor.shape[1] == channels else torch.cat([first, tensor[:, channels:]], dim=1)


def _scale(sigma: Scalar) -> Scalar:
    """S = α + β at the flow's σ."""
    scale: Scalar = ((1 - sigma) ** 2 + sigma**2) ** -0.5
    return scale
