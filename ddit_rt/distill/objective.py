"""The loss between the frozen base model and the adapted one, computed through the very path that inference takes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..families import Family
from ..granularity import Adapter, AdapterPath, Anchor, Models, PredictionHistory, Scalar
from .samples import Batch, Moment

_FLOOR = 3e-4
"""Of velocities of about unit variance: errors below it cannot be seen in a picture."""


class Student(nn.Module):
    """An adapter on a frozen transformer; its parameters are the adapter's alone.

    Args:
        adapter: What is trained.
        family: Of the transformer.
        base: The transformer, frozen.
        relative: Count every sample's error in units of the forecast's, see ``DistillConfig.weighting``.
    """

    def __init__(self, adapter: Adapter, family: Family, base: nn.Module, relative: bool = False) -> None:
        super().__init__()
        self.adapter = adapter
        self.relative = relative
        # kept out of the module tree: neither saved, nor counted, nor moved with the adapter
        self.__dict__["_frozen"] = base
        self._family = family
        self._native = adapter.spec.positions == "native"

    def coarse(self, multiple: int) -> AbstractContextManager[None]:
        """Context for forward and backward passes at ``multiple``: recomputed blocks need the LoRA again."""
        return self.adapter.lora(multiple).active(self.__dict__["_frozen"])

    def forward(self, batch: Batch) -> torch.Tensor:
        """Mean squared distance to the base model's prediction (equation 1), or to its change; float32 scalar.

        Belongs inside :meth:`coarse`. With ``relative`` it is 1 where the adapter is as good as the forecast.
        """
        error = _squared(self.predict(batch), batch)
        if self.relative and len(batch.memory) > 1:
            error = error / (_squared(batch.forecast(), batch) + _FLOOR)
        return error.mean()

    def predict(self, batch: Batch) -> torch.Tensor:
        """The adapted model's prediction, float32 (B, C, F, H, W)."""
        models = self._models(batch)
        trajectory = PredictionHistory()
        trajectory.anchors.extend(_anchor(moment, models) for moment in batch.memory)
        target = batch.target
        path = AdapterPath(self.adapter, delta=batch.delta)
        # paths name their noise level a number; a tensor of one per sample computes the same
        sigma: Any = target.sigma
        return path.predict(trajectory, target.latent, sigma, batch.multiple, batch.call.geometry, models)

    def _models(self, batch: Batch) -> Models:
        base = self.__dict__["_frozen"]

        def tokens(latent: torch.Tensor, sigma: Scalar, multiple: int) -> torch.Tensor:
            embedding = self.adapter.size(multiple).embedding
            result = self._family.run_patches(
                base, base.forward, batch.call, latent, sigma, embedding, multiple, self._native
            )
            return result.float()

        return Models(low=tokens, tokens=tokens)


def _squared(prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared distance of every sample, (B,)."""
    return (prediction - batch.target.prediction).square().flatten(1).mean(1)


def _anchor(moment: Moment, models: Models) -> Anchor:
    sigma: Any = moment.sigma
    return Anchor(sigma, moment.latent, moment.prediction, models)
