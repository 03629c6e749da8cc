"""Naive: the model on coarse tokens through PI-resized projections, and nothing else."""

from __future__ import annotations

import torch

from .. import bands
from ..geometry import Geometry
from .base import CoarsePath, Models, PredictionHistory
from .registry import PathOptions, register_path


@register_path("naive")
def naive(options: PathOptions) -> CoarsePath:
    """PI-resized projections, as the paper starts from."""
    return NaivePath()


class NaivePath(CoarsePath):
    """The model on coarse tokens with its own embedding and de-embedding for that size, PI-resized."""

    needs_projections = True
    told_level = "own"
    positions = "interpolated"

    def predict(
        self,
        history: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        prediction = models.tokens(bands.pad_to_grid(latent, geometry, multiple), sigma, multiple)
        return bands.crop_to_latent(prediction.float(), geometry)
