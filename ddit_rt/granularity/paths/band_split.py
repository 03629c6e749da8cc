"""Band-split and delta: the low band from the model on the k x k means, the high band from what the run knows."""

from __future__ import annotations

import torch

from .. import bands
from ..geometry import Geometry
from .base import Anchor, CoarsePath, Models, PredictionHistory, line, residual_at
from .registry import PathOptions, register_path


@register_path("band-split")
def band_split(options: PathOptions) -> CoarsePath:
    """Every coarse step on its own."""
    return BandSplitPath(delta=False)


@register_path("delta")
def delta(options: PathOptions) -> CoarsePath:
    """Anchored at the last full steps; the default without an adapter."""
    return BandSplitPath(delta=True, extrapolate=options.residual == "linear", line=options.high_band == "line")


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
        self.delta = self.prefers_anchor = delta
        self.max_consecutive = 2 if delta else None
        self.extrapolate = extrapolate
        self.line = line
        self.anchors = 2 if extrapolate or line else 1
        self.probes = (2 if extrapolate else 1) if delta else 0

    def predict(
        self,
        history: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        padded = bands.pad_to_grid(latent, geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, sigma, multiple)
        low = bands.low_velocity(low_latent, low_sigma, models.low(low_latent, low_sigma, multiple), multiple)
        if self.delta and history.last is not None:
            low = low + residual_at(self, history, sigma, multiple, geometry, self.extrapolate)
        high = self._high(history, padded, sigma, multiple, geometry)
        return bands.crop_to_latent(bands.up(low, multiple) + high, geometry)

    def _high(
        self,
        history: PredictionHistory,
        padded: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
    ) -> torch.Tensor:
        if self.line and len(history.anchors) > 1:
            older, newest = history.anchors[0], history.anchors[-1]
            ahead = line((older.sigma, older.prediction), (newest.sigma, newest.prediction), sigma)
            return bands.high_band(bands.pad_to_grid(ahead, geometry, multiple), multiple)
        noise = bands.high_band(padded, multiple)
        anchor = history.last
        if anchor is not None:
            clean = anchor.latent.float() - anchor.sigma * anchor.prediction.float()
            noise = noise - bands.high_band(bands.pad_to_grid(clean, geometry, multiple), multiple)
        return noise / sigma

    def missed(self, anchor: Anchor, multiple: int, geometry: Geometry) -> torch.Tensor:
        """down(v_full) - v_low, float32 (B, C, F, H/k, W/k)."""
        padded = bands.pad_to_grid(anchor.latent.float(), geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, anchor.sigma, multiple)
        prediction = anchor.models.low(low_latent, low_sigma, multiple)
        low = bands.low_velocity(low_latent, low_sigma, prediction, multiple)
        return bands.down(bands.pad_to_grid(anchor.prediction.float(), geometry, multiple), multiple) - low
