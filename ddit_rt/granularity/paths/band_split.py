"""Band-split and delta: the low band from the model on the k x k means, the high band from what the run knows."""

from __future__ import annotations

import torch

from ...ops import BandMemory
from .. import bands
from ..geometry import Geometry
from .base import Anchor, CoarsePath, Models, PredictionHistory, as_tensor, known_residual, line, residual_at
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

    takes_kernels = True
    told_level = "low"

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
        if models.bands is not None:
            return models.bands(latent, sigma, multiple, self._memory(history, multiple, geometry))
        padded = bands.pad_to_grid(latent, geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, sigma, multiple)
        low = bands.low_velocity(low_latent, low_sigma, models.low(low_latent, low_sigma, multiple), multiple)
        anchors = history.anchors
        if self.delta and anchors:
            low = low + residual_at(self, history, sigma, multiple, geometry, self.extrapolate)
        if self.line and len(anchors) > 1:
            older, newest = anchors[0], anchors[-1]
            ahead = line((older.sigma, older.prediction), (newest.sigma, newest.prediction), sigma)
            high = bands.high_band(bands.pad_to_grid(ahead, geometry, multiple), multiple)
        else:
            noise = bands.high_band(padded, multiple)
            if anchors:
                clean = anchors[-1].latent.float() - anchors[-1].sigma * anchors[-1].prediction.float()
                noise = noise - bands.high_band(bands.pad_to_grid(clean, geometry, multiple), multiple)
            high = noise / sigma
        return bands.crop_to_latent(bands.up(low, multiple) + high, geometry)

    def missed(self, anchor: Anchor, multiple: int, geometry: Geometry) -> torch.Tensor:
        """down(v_full) - v_low, float32 (B, C, F, H/k, W/k)."""
        if anchor.models.bands is not None:
            memory = BandMemory("probe", newest=anchor.prediction)
            return anchor.models.bands(anchor.latent, anchor.sigma, multiple, memory)
        padded = bands.pad_to_grid(anchor.latent.float(), geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, anchor.sigma, multiple)
        prediction = anchor.models.low(low_latent, low_sigma, multiple)
        low = bands.low_velocity(low_latent, low_sigma, prediction, multiple)
        return bands.means(anchor.prediction.float(), geometry, multiple) - low

    def _memory(self, history: PredictionHistory, multiple: int, geometry: Geometry) -> BandMemory:
        """What of the last full steps a fused run takes, as ``predict`` does."""
        if not history.anchors:
            return BandMemory()
        newest = history.anchors[-1]
        older = history.anchors[0] if len(history.anchors) > 1 else None
        line = self.line and older is not None
        extrapolated = older if self.delta and self.extrapolate else None
        return BandMemory(
            "line" if line else "clean",
            anchor=None if line else newest.latent,
            newest=newest.prediction,
            older=older.prediction if older is not None and line else None,
            residual=known_residual(self, newest, multiple, geometry) if self.delta else None,
            residual_older=None if extrapolated is None else known_residual(self, extrapolated, multiple, geometry),
            level_newest=as_tensor(newest.sigma),
            level_older=None if older is None else as_tensor(older.sigma),
        )
