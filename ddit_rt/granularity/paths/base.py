"""What a coarse step computes: the prediction at full resolution from a model run on fewer tokens, or on none.

Every path sees latents in canonical layout (B, C, F, H, W), float32, and calls the model through ``run_low`` or
``run_tokens``; it knows nothing of the transformer's class. One :class:`PredictionHistory` per model call of a step
(guidance makes two) holds what a path remembers from step to step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...ops import BandMemory
from .. import bands
from ..adapter.model import Adapter
from ..geometry import Geometry

# (low latent (B, C, F, H/k, W/k) float32, its noise level, multiple) -> prediction of the same shape, float32
RunLow = Callable[[torch.Tensor, bands.Scalar, int], torch.Tensor]
# (latent (B, C, F, H, W), its noise level as a tensor, multiple, what the run remembers) -> band-split's velocity,
# float32 (B, C, F, H, W); for a probe what it misses, (B, C, F, H'/k, W'/k)
RunBands = Callable[[torch.Tensor, bands.Scalar, int, BandMemory], torch.Tensor]
# (latent padded to the grid (B, C, F, H, W), noise level, multiple) -> prediction of the same shape, float32
RunTokens = Callable[[torch.Tensor, bands.Scalar, int], torch.Tensor]


@dataclass(frozen=True)
class Models:
    """How a path reaches the model at the current step.

    Attributes:
        low: Runs it on a low state.
        tokens: Runs it between other projections.
        bands: Runs it on a low state with band-split's algebra fused into the transformer's ends; None where that
            cannot be, or is not wanted. Its result is what the algebra around ``low`` gives, but for rounding.
        backend: Of :mod:`ddit_rt.ops`, where a path may compute by kernels what lies around ``tokens``, which then
            takes and gives the model's dtype; None where it may not.
    """

    low: RunLow
    tokens: RunTokens
    bands: RunBands | None = None
    backend: str | None = None


@dataclass
class Anchor:
    """A full step: its latent, the model's prediction there, and σ.

    Of a flow both are as the pipeline had them; else the flow state and velocity that they amount to, float32.
    """

    sigma: bands.Scalar
    latent: torch.Tensor
    prediction: torch.Tensor
    models: Models
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class PredictionHistory:
    """What one stream of model calls (the conditional one, say) has seen in this pipeline call.

    Attributes:
        anchors: The last two full steps.
        recent: σ and prediction (B, C, F, H, W) of the last two model runs, at whatever multiple.
        companion: The same of a second output that rides along, as the sound of a video; it has no anchors. None where
            there is none.
    """

    anchors: deque[Anchor] = field(default_factory=lambda: deque(maxlen=2))
    recent: deque[tuple[float, torch.Tensor]] = field(default_factory=lambda: deque(maxlen=2))
    companion: PredictionHistory | None = None

    @property
    def last(self) -> Anchor | None:
        return self.anchors[-1] if self.anchors else None

    def add_full(self, anchor: Anchor) -> None:
        """Adds a full step; see :meth:`add_run`."""
        if self.last is not None and self.last.sigma == anchor.sigma:
            self.anchors.pop()
        self.anchors.append(anchor)
        self.add_run(float(anchor.sigma), anchor.prediction)

    def add_run(self, sigma: float, prediction: torch.Tensor) -> None:
        """Adds a model run. It replaces one at the same σ, as Heun's method makes two: no slope lies between them."""
        if self.recent and self.recent[-1][0] == sigma:
            self.recent.pop()
        self.recent.append((sigma, prediction))

    def add_companion(self, sigma: float, prediction: torch.Tensor) -> None:
        """Adds what a model run predicted of the second output."""
        self.companion = self.companion or PredictionHistory()
        self.companion.add_run(sigma, prediction)

    def forecast(self, sigma: bands.Scalar, linear: bool = True) -> torch.Tensor:
        """The prediction to expect at ``sigma``, without a model run: the last one, or the line through the last two.

        Returns:
            float32 (B, C, F, H, W).
        """
        if not linear or len(self.recent) < 2:
            return self.recent[-1][1].float()
        return line(self.recent[0], self.recent[-1], sigma)


def line(
    older: tuple[bands.Scalar, torch.Tensor], newest: tuple[bands.Scalar, torch.Tensor], sigma: bands.Scalar
) -> torch.Tensor:
    """The straight line through values at two noise levels, at ``sigma`` beyond the newest; float32.

    It is followed no further than the two lie apart, and held from there: two neighbouring steps tell little of a
    slope, and a longer way would multiply the error of their difference. On the demo model that is worth 0.7 dB to
    delta and 2 dB to extrapolation.
    """
    share = (sigma - newest[0]) / (newest[0] - older[0])
    share = share.clamp(max=1.0) if isinstance(share, torch.Tensor) else min(share, 1.0)
    return newest[1].float() + share * (newest[1].float() - older[1].float())


class CoarsePath(ABC):
    """One way to predict at a coarse step.

    Attributes:
        needs_anchor: There has to be a full step before.
        prefers_anchor: The policy leaves a step full where there was none; a given schedule may do without.
        told_level: The noise level that coarse runs are told: ``"own"``, the latent's, or ``"low"``, that of its low
            band; empty where it is neither or there are none.
        needs_projections: The model is run through ``models.tokens``, with embedding and de-embedding for that size.
        calls_model: A prediction runs the model.
        anchors: How many of the last full steps a prediction looks at.
        probes: For how many of them it needs what the coarse model missed there.
        positions: Coordinates of coarse tokens by default, ``"native"`` or ``"interpolated"``.
        max_consecutive: Longest run of coarse steps that the policy makes by default; None: no limit.
        adapter: The trained adapter that it runs, or None.
        takes_kernels: ``predict`` and ``missed`` use ``models.bands`` or ``models.backend`` where there is one; latents
            are in the model's dtype then, and not in float32.
    """

    needs_anchor = False
    prefers_anchor = False
    needs_projections = False
    told_level = ""
    calls_model = True
    anchors = 0
    probes = 0
    positions = "native"
    max_consecutive: int | None = None
    adapter: Adapter | None = None
    takes_kernels = False

    @abstractmethod
    def predict(
        self,
        history: PredictionHistory,
        latent: torch.Tensor,
        sigma: bands.Scalar,
        multiple: int,
        geometry: Geometry,
        models: Models,
    ) -> torch.Tensor:
        """Prediction at full resolution, float32 (B, C, F, H, W), for ``latent`` at noise level ``sigma``.

        A captured graph may repeat it with other values in the same tensors: no decision may depend on a value.
        """

    def missed(self, anchor: Anchor, multiple: int, geometry: Geometry) -> torch.Tensor:
        """The residual of a full step, as ``predict`` adds it to later ones; one coarse run, under the same rule."""
        latent = anchor.latent.float()
        own = self.predict(PredictionHistory(), latent, anchor.sigma, multiple, geometry, anchor.models)
        return anchor.prediction.float() - own


def residual_at(
    path: CoarsePath,
    history: PredictionHistory,
    sigma: bands.Scalar,
    multiple: int,
    geometry: Geometry,
    extrapolate: bool,
) -> torch.Tensor:
    """The residual of the last full step, or the line through those of the last two, at ``sigma``."""
    newest = history.anchors[-1]
    last = known_residual(path, newest, multiple, geometry)
    if not extrapolate or len(history.anchors) < 2:
        return last
    older = history.anchors[-2]
    return line((older.sigma, known_residual(path, older, multiple, geometry)), (newest.sigma, last), sigma)


def as_tensor(level: bands.Scalar) -> torch.Tensor:
    """A noise level that a captured graph reads, which is a tensor."""
    assert isinstance(level, torch.Tensor)
    return level


def known_residual(path: CoarsePath, anchor: Anchor, multiple: int, geometry: Geometry) -> torch.Tensor:
    """What the coarse model missed at a full step, kept per multiple; what is not there yet costs a coarse run."""
    if multiple not in anchor.residuals:
        anchor.residuals[multiple] = path.missed(anchor, multiple, geometry)
    return anchor.residuals[multiple]
