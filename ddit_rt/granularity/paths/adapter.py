"""The coarse step of a trained adapter: band-split with learned additions in every place where it guesses.

With z the latent, s and σ' the scale and noise level of its low band (see :mod:`ddit_rt.granularity.bands`) and k the
multiple, the trunk runs at σ' on tokens of k·p x k·p patches, embedded from [s·z, σ, memory], and its de-embedding
gives two predictions at full resolution, o and c. Then

    b = up(v_low(down(o))) + (h - h0)/σ
    v = b + g·(forecast - b) + r·(c + residual([s·z, σ, memory]))

where b is band-split and all else is zero before training. Memory is what the run already knows: the last full
prediction, the direction of the straight line through the last two, the distance in σ, and whether there is any; the
forecast is that line's end. It costs nothing and is hard to beat over short distances, so the adapter may start from it
(g towards 1) and spend the trunk on what it misses. What it misses shrinks with the line's way, whose root mean square
is r (of one full step, the distance): without that unit the correction's own error would be the same where there is
nothing to correct. Without memory g is 0, r is 1 and the adapter is the paper's, a function of the latent alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import ops
from .. import bands
from ..adapter.model import Adapter
from ..bands import Scalar
from ..geometry import Geometry
from .base import Anchor, CoarsePath, Models, PredictionHistory, as_tensor, line, residual_at
from .registry import PathOptions, register_path

# a single number per channel has to travel from 0 to about 1; the other weights move by hundredths
_TRUST_SPEED = 20.0
_LEAST = 1e-4


@register_path("adapter")
def adapter(options: PathOptions) -> CoarsePath:
    """The trained adapter; the default where one is given."""
    return AdapterPath(options.require_adapter(), delta=False)


@register_path("adapter-delta")
def adapter_delta(options: PathOptions) -> CoarsePath:
    """The trained adapter, supplying only the change since the last full step."""
    return AdapterPath(options.require_adapter(), delta=True, extrapolate=options.residual == "linear")


class AdapterPath(CoarsePath):
    """An adapter's prediction.

    Args:
        adapter: Its weights, placed where the latents are.
        delta: Anchor the prediction at the last full step: the adapter supplies only the change since then. Costs one
            coarse run at every full step that a coarse one follows.
        extrapolate: With ``delta``, extrapolate the residual linearly from the last two full steps, instead of
            holding it. An adapter with memory sees that line itself, and holds it.
    """

    needs_projections = takes_kernels = True
    told_level = "low"
    anchors = 2
    adapter: Adapter

    def __init__(self, adapter: Adapter, delta: bool, extrapolate: bool = False) -> None:
        self.adapter = adapter
        self.positions = adapter.spec.positions
        self.max_consecutive = adapter.spec.reach
        self.delta = delta
        self.extrapolate = extrapolate and not adapter.spec.memory
        self.probes = (2 if self.extrapolate else 1) if delta else 0

    def predict(
        self,
        history: PredictionHistory,
        latent: torch.Tensor,
        sigma: Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        """Prediction at full resolution, float32 (B, C, F, H, W); ``sigma`` may be a tensor (B, 1, 1, 1, 1)."""
        anchors = list(history.anchors)
        prediction = self._run(anchors, latent, sigma, multiple, geometry, models)
        if self.delta and anchors:
            prediction = prediction + residual_at(self, history, sigma, multiple, geometry, self.extrapolate)
        return prediction

    def missed(self, anchor: Anchor, multiple: int, geometry: Geometry) -> torch.Tensor:
        """v_full less the adapter's own prediction there, float32 (B, C, F, H, W)."""
        latent = anchor.latent if anchor.models.backend is not None else anchor.latent.float()
        own = self._run([anchor], latent, anchor.sigma, multiple, geometry, anchor.models)
        return anchor.prediction.float() - own

    def _run(
        self,
        anchors: Sequence[Anchor],
        latent: torch.Tensor,
        sigma: Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        if models.backend is not None:
            return self._run_fused(anchors, latent, sigma, multiple, geometry, models)
        padded = bands.pad_to_grid(latent, geometry, multiple)
        low_latent, low_sigma = bands.low_state(padded, sigma, multiple)
        high = bands.high_band(padded, multiple)
        if anchors:
            clean = anchors[-1].latent.float() - anchors[-1].sigma * anchors[-1].prediction.float()
            high = high - bands.high_band(bands.pad_to_grid(clean, geometry, multiple), multiple)
        features, forecast, scale = self._features(anchors, padded, sigma, multiple, geometry)
        out, correction = models.tokens(features, low_sigma, multiple).chunk(2, dim=1)
        low = bands.low_velocity(low_latent, low_sigma, bands.down(out, multiple), multiple)
        velocity = bands.up(low, multiple) + high / sigma
        size = self.adapter.size(multiple)
        if forecast is not None:
            trust = _TRUST_SPEED * size.trust.float()
            velocity = velocity + trust.view(1, -1, 1, 1, 1) * (forecast - velocity)
        residual = size.residual(features.to(size.embedding.embed.dtype)).float()
        return bands.crop_to_latent(velocity + scale * (correction + residual), geometry)

    def _run_fused(
        self,
        anchors: Sequence[Anchor],
        latent: torch.Tensor,
        sigma: Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        """The same in kernels, all but the adapter's own layers; ``sigma`` and the anchors' are tensors."""
        backend, size = models.backend, self.adapter.size(multiple)
        assert backend is not None
        level = as_tensor(sigma)
        newest = anchors[-1] if anchors else None
        older = anchors[0] if len(anchors) > 1 else None
        memory = ops.BandMemory(
            anchor=None if newest is None else newest.latent,
            newest=None if newest is None else newest.prediction,
            older=None if older is None else older.prediction,
            level_newest=None if newest is None else as_tensor(newest.sigma),
            level_older=None if older is None else as_tensor(older.sigma),
        )
        side, reads = multiple * geometry.patch, self.adapter.spec.memory
        rows, columns = geometry.grid(multiple)
        grid = (rows * side, columns * side)
        given = ops.adapter_features(latent, level, multiple, grid, memory, reads, backend=backend)
        return ops.adapter_velocity(
            latent,
            level,
            multiple,
            models.tokens(given.features, given.level, multiple),
            size.residual.tokens(given.features, backend),
            side,
            memory,
            given.factors,
            trust=size.trust.detach() if reads else None,
            trust_speed=_TRUST_SPEED,
            backend=backend,
        )

    def _features(
        self, anchors: Sequence[Anchor], padded: torch.Tensor, sigma: Scalar, multiple: int, geometry: Geometry
    ) -> tuple[torch.Tensor, torch.Tensor | None, Scalar]:
        """What the adapter reads, (B, C + extra, F, H, W); the forecast (B, C, F, H, W) if there is one; its scale.

        See :attr:`ddit_rt.granularity.adapter.AdapterSpec.extra`.
        """
        plane = torch.zeros_like(padded[:, :1])
        parts = [bands.low_scale(sigma, multiple) * padded, plane + sigma]
        if not self.adapter.spec.memory:
            return torch.cat(parts, dim=1), None, 1.0
        last = slope = torch.zeros_like(padded)
        distance: Scalar = 0.0
        scale: Scalar = 1.0
        if anchors:
            newest, older = anchors[-1], anchors[-2] if len(anchors) > 1 else None
            last = bands.pad_to_grid(newest.prediction.float(), geometry, multiple)
            scale = distance = newest.sigma - sigma
            if older is not None:
                before = bands.pad_to_grid(older.prediction.float(), geometry, multiple)
                slope = line((older.sigma, before), (newest.sigma, last), sigma) - last
                scale = slope.square().mean((1, 2, 3, 4), keepdim=True).sqrt() + _LEAST
        direction = slope / scale if len(anchors) > 1 else slope
        parts += [last, direction, plane + distance, plane + (1.0 if anchors else 0.0)]
        return torch.cat(parts, dim=1), last + slope if anchors else None, scale
