"""Extrapolate and reuse: coarse steps that make no model call, from the last full predictions."""

from __future__ import annotations

import torch

from .. import bands
from ..geometry import Geometry
from .base import CoarsePath, Models, PredictionHistory


class ForecastPath(CoarsePath):
    """No model call: the last full prediction again, or the straight line through the last two."""

    needs_anchor = True

    def __init__(self, linear: bool) -> None:
        self.linear = linear

    def predict(
        self,
        trajectory: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        return trajectory.forecast(sigma, self.linear)
