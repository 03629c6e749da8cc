"""What each conditioning of a sampling run has seen, joined for a call that runs several of them as one batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from ...granularity import Anchor, Models, PredictionHistory


def joined(parts: Sequence[PredictionHistory], models: Models) -> PredictionHistory | None:
    """One history for a batch, in the order of ``parts``; None if they have not seen the same noise levels.

    Args:
        parts: One per conditioning.
        models: How the call at hand reaches the model: a conditioning is the same at every step, so that an earlier one
            can be run again through it.
    """
    if len({(_levels(part), tuple(level for level, _ in part.recent)) for part in parts}) > 1:
        return None
    anchors = [_joined_anchor(found, models) for found in zip(*(part.anchors for part in parts))]
    recent = [
        (runs[0][0], _cat([prediction for _, prediction in runs])) for runs in zip(*(part.recent for part in parts))
    ]
    return PredictionHistory(deque(anchors, maxlen=2), deque(recent, maxlen=2))


def keep_residuals(history: PredictionHistory, parts: Sequence[PredictionHistory]) -> None:
    """Gives every conditioning its part of what was computed on the joined history."""
    for index, anchor in enumerate(history.anchors):
        for multiple, residual in anchor.residuals.items():
            for part, own in zip(parts, residual.chunk(len(parts))):
                part.anchors[index].residuals.setdefault(multiple, own)


def add_full(
    parts: Sequence[PredictionHistory], sigma: float, latent: torch.Tensor, prediction: torch.Tensor, models: Models
) -> None:
    """Adds a full step of a batch, (B, C, F, H, W), to the history of each conditioning."""
    for part, z, v in zip(parts, latent.chunk(len(parts)), prediction.chunk(len(parts))):
        part.add_full(Anchor(sigma, z, v, models))


def add_run(parts: Sequence[PredictionHistory], sigma: float, prediction: torch.Tensor) -> None:
    """Adds a coarse step of a batch."""
    for part, v in zip(parts, prediction.chunk(len(parts))):
        part.add_run(sigma, v)


def _levels(part: PredictionHistory) -> tuple[float, ...]:
    return tuple(float(anchor.sigma) for anchor in part.anchors)


def _joined_anchor(anchors: Sequence[Anchor], models: Models) -> Anchor:
    known = set.intersection(*(set(anchor.residuals) for anchor in anchors))
    return Anchor(
        anchors[0].sigma,
        _cat([anchor.latent for anchor in anchors]),
        _cat([anchor.prediction for anchor in anchors]),
        models,
        {multiple: _cat([anchor.residuals[multiple] for anchor in anchors]) for multiple in known},
    )


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
