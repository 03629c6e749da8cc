"""The weights that coarse runs read beside the transformer's own, and when they have to be read again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..families import Family, ModelInputs, lora_scale, scaled_loras
from ..granularity import CoarsePath, MergedSet, PatchEmbedding

logger = logging.getLogger(__name__)


def unread_loras(family: Family, base: nn.Module) -> str:
    """What a LoRA of the user's cannot do beside an adapter; empty if there is none on the transformer's ends."""
    names = family.loras_on_ends(base)
    return names and f"the LoRA on {names} changes full steps alone: in coarse ones the adapter's weights stand there"


class CoarseWeights:
    """An adapter's weights, or the model's own ends resized; copies that follow the model as it changes.

    Args:
        family: Of the transformers.
        path: What a coarse step computes.
        merged: Multiples whose LoRA is merged into copies of the weights.
    """

    def __init__(self, family: Family, path: CoarsePath, merged: Sequence[int] = ()) -> None:
        self._family, self._path = family, path
        self._merged_sizes = tuple(merged)
        self._merged: dict[tuple[int, int], MergedSet] = {}
        self._embeddings: dict[tuple[int, int], PatchEmbedding] = {}
        self._stamps: dict[tuple[int, int], tuple[object, ...]] = {}
        # models whose copied weights have been brought up to date in this pipeline call
        self._renewed: set[tuple[int, int]] = set()
        self._logged = False

    def begin_call(self) -> None:
        """A pipeline call begins: weights that leave no trace of a change are read again when first used in it."""
        self._renewed.clear()

    def refresh(self, base: nn.Module, inputs: ModelInputs) -> None:
        """Notices that the model's weights have changed, where an adapter leans on them."""
        adapter = self._path.adapter
        if adapter is None:
            return
        unread = "" if self._logged else unread_loras(self._family, base)
        if unread:
            self._logged = True
            logger.warning("%s", unread)
        adapter.place(inputs.latent.device, inputs.latent.dtype)
        for merged in dict.fromkeys(self._merged_set(base, k) for k in self._merged_sizes):
            merged.refresh(thorough=self._first_time(id(base), 0))
        self._renewed.add((id(base), 0))

    def embedding(self, base: nn.Module, multiple: int, inputs: ModelInputs) -> PatchEmbedding:
        """The ends for coarse tokens of a call, on the device and in the dtype of its latent."""
        if self._path.adapter is not None:
            return self._path.adapter.size(multiple).embedding
        key, like = (id(base), multiple), inputs.latent
        ends = [base.get_submodule(name) for name in self._family.projection_names]
        scaled = scaled_loras(ends, lora_scale(inputs.arguments))
        # a copy made in inference mode could not be renewed outside it
        with torch.inference_mode(False), torch.no_grad(), scaled:
            stamp = self._family.stamp(base)
            is_new = key not in self._embeddings
            if is_new:
                self._embeddings[key] = self._family.patch_embedding(base, multiple).requires_grad_(False)
            found = self._embeddings[key].to(like.device, like.dtype)
            if not is_new and (self._first_time(*key) or self._stamps[key] != stamp):
                # a fused LoRA or another dtype changes what was resized, and may leave no trace of it; captured graphs
                # read the copy where it is
                found.renew(self._family.patch_embedding(base, multiple))
            self._stamps[key] = stamp
            self._renewed.add(key)
            return found

    def lora(self, base: nn.Module, multiple: int) -> AbstractContextManager[None]:
        """Context in which the transformer's layers have the adapter's LoRA beside them, or merged."""
        adapter = self._path.adapter
        if adapter is None:
            return nullcontext()
        if multiple in self._merged_sizes:
            return self._merged_set(base, multiple).active()
        return adapter.lora(multiple).active(base)

    def flops(self, multiple: int, tokens: int, beside: int) -> float:
        """FLOP that an adapter adds to a coarse run of so many tokens, and so many beside them."""
        adapter = self._path.adapter
        if adapter is None or multiple == 1:
            return 0.0
        return adapter.flops(multiple, tokens, beside, multiple in self._merged_sizes)

    def _first_time(self, module: int, multiple: int) -> bool:
        """Whether a copy of weights is used for the first time in this pipeline call."""
        return (module, multiple) not in self._renewed

    def _merged_set(self, base: nn.Module, multiple: int) -> MergedSet:
        assert self._path.adapter is not None
        lora = self._path.adapter.lora(multiple)  # one for all multiples, if the adapter shares it
        key = (id(base), id(lora))
        if key not in self._merged:
            self._merged[key] = MergedSet(lora, base)
        return self._merged[key]
