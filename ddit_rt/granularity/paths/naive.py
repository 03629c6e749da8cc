"""Naive: the model on coarse tokens through PI-resized projections, and nothing else."""

from __future__ import annotations

import torch

from .. import bands
from ..geometry import Geometry, crop_to_latent, pad_to_grid
from .base import CoarsePath, Models, PredictionHistory


class NaivePath(CoarsePath):
    """The model on coarse tokens with its own embedding and de-embedding for that size, PI-resized."""

    needs_embedding = True

    def predict(
        self,
        trajectory: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        return crop_to_latent(models.tokens(pad_to_grid(latent, geometry, multiple), sigma, multiple), geometry)
