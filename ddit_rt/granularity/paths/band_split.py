"""Band-split and delta: the low band from the model on the k x k means, the high band from what the run knows."""

from __future__ import annotations

import torch

from .. import bands
from ..geometry import Geometry, crop_to_latent, pad_to_grid
from .base import Anchor, CoarsePath, Models, PredictionHistory, line, residual_at


class BandSplitPath(CoarsePath):
    """Low band from the model on the k x k means, high band from the noise that is left in it.

    Args:
        delta: Anchor the low band at the last full step: the model supplies only the change since then, and its bias
            cancels.
        extrapolate: With ``delta``, extrapolate the residual linearly from the last two full steps.
        line: Take the high band from the straight line through the last two full predictions instead, where there are
            two.
    """

    def __init__(self, delta: bool, extrapolate: bool = False, line: bool = False) -> None:
        self.delta = delta
        self.extrapolate = extrapolate
        self.line = line
        self.anchors = 2 if extrapolate or line else 1
        self.probes = (2 if extrapolate else 1) if delta else 0

    def predict(
        self,
        trajectory: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        padded = pad_to_grid(latent, geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, sigma, multiple)
        low = bands.low_velocity(low_latent, low_sigma, models.low(low_latent, low_sigma, multiple), multiple)
        if self.delta and trajectory.last is not None:
            low = low + residual_at(self, trajectory, sigma, multiple, geometry, self.extrapolate)
        high = self._high(trajectory, padded, sigma, multiple, geometry)
        return crop_to_latent(bands.up(low, multiple) + high, geometry)

    def _high(
        self,
        trajectory: PredictionHistory,
        padded: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
    ) -> torch.Tensor:
        if self.line and len(trajectory.anchors) > 1:
            older, newest = trajectory.anchors[0], trajectory.anchors[-1]
            ahead = line((older.sigma, older.prediction), (newest.sigma, newest.prediction), sigma)
            return bands.high_band(pad_to_grid(ahead, geometry, multiple), multiple)
        noise = bands.high_band(padded, multiple)
        anchor = trajectory.last
        if anchor is not None:
            clean = anchor.latent.float() - anchor.sigma * anchor.prediction.float()
            noise = noise - bands.high_band(pad_to_grid(clean, geometry, multiple), multiple)
        return noise / sigma

    def missed(self, anchor: Anchor, multiple: int, geometry: Geometry) -> torch.Tensor:
        """down(v_full) - v_low, float32 (B, C, F, H/k, W/k)."""
        padded = pad_to_grid(anchor.latent.float(), geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, anchor.sigma, multiple)
        prediction = anchor.models.low(low_latent, low_sigma, multiple)
        low = bands.low_velocity(low_latent, low_sigma, prediction, multiple)
        return bands.down(pad_to_grid(anchor.prediction.float(), geometry, multiple), multiple) - low
