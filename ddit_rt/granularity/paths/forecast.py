"""Extrapolate and reuse: coarse steps that make no model call, from the last full predictions."""

from __future__ import annotations

import torch

from .. import bands
from ..geometry import Geometry
from .base import CoarsePath, Models, PredictionHistory
from .registry import PathOptions, register_path


@register_path("extrapolate")
def extrapolate(options: PathOptions) -> CoarsePath:
    """The straight line through the last two predictions."""
    return ForecastPath(linear=True)


@register_path("reuse")
def reuse(options: PathOptions) -> CoarsePath:
    """The last prediction again."""
    return ForecastPath(linear=False)


class ForecastPath(CoarsePath):
    """No model call: the last full prediction again, or the straight line through the last two."""

    needs_anchor = True
    calls_model = False
    max_consecutive = 2

    def __init__(self, linear: bool) -> None:
        self.linear = linear

    def predict(
        self,
        history: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        return history.forecast(sigma, self.linear)
