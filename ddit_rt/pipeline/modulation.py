"""Modulations of all steps of a pipeline call, made together when the first of them is needed.

A diffusion transformer makes scales and shifts from the noise level by matrix products of one row per sample, which
read their weights for it in every step. The noise levels of a call are known when it begins, so that one product per
layer can serve them all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..families import Family, lora_scale
from ..granularity import bands
from ..multiples import noise_shrink

logger = logging.getLogger(__name__)

MOST_TABLES = 18
"""Of a call: two transformers, two guidance calls and both in one batch, and three sizes. Who needs more changes its
conditions in every step, and then there is nothing to make ahead."""


@dataclass(frozen=True)
class Modulation:
    """What some modules give in one step.

    Attributes:
        layout: Their paths, and the width of each result.
        values: (B, sum of the widths).
    """

    layout: tuple[tuple[str, int], ...]
    values: torch.Tensor

    def results(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Path -> (B, width), of :attr:`values` or of other memory with the same content."""
        pieces = values.split([width for _, width in self.layout], dim=1)
        return {path: piece for (path, _), piece in zip(self.layout, pieces)}


@dataclass(frozen=True)
class _Table:
    layout: tuple[tuple[str, int], ...]
    values: torch.Tensor  # (n, B, sum of the widths)
    # kept, so that no other tensor takes their identity
    read: tuple[torch.Tensor | None, ...]
    versions: tuple[int | None, ...]


class ModulationAhead:
    """The modulations of one pipeline call. They are made anew when what they depend on is another tensor.

    Args:
        family: Of the transformer; it has :attr:`~ddit_rt.families.Family.modulation_inputs`.
        timesteps: The scheduler's, of the call's steps.
        sigmas: Noise levels of at least these steps.
        told_level: What coarse runs are told, see :class:`~ddit_rt.granularity.CoarsePath`; empty: they make their own.
    """

    def __init__(self, family: Family, timesteps: Sequence[float], sigmas: Sequence[float], told_level: str) -> None:
        self._family = family
        self._timesteps, self._sigmas = timesteps, sigmas[: len(timesteps)]
        self._told_level = told_level
        self._tables: dict[tuple[int, ...], _Table] = {}
        self._off = False

    def starts_at(self, told: torch.Tensor) -> bool:
        """Whether the transformer's first ``timestep`` is the one expected; waits for the device."""
        first = torch.tensor(self._timesteps[:1], dtype=torch.float32)
        return float(self._family.told_times(first, told.dtype)) == float(told)

    def of_step(self, base: nn.Module, step: int, arguments: Mapping[str, Any], multiple: int) -> Modulation | None:
        """What the transformer's modules give in a step at ``multiple``; None where it has to find out itself.

        Args:
            base: The transformer.
            step: From 0.
            arguments: Of its call, by name.
            multiple: k.
        """
        if self._off or (multiple > 1 and not self._told_level):
            return None
        read = tuple(arguments.get(name) for name in self._family.modulation_inputs)
        key = (id(base), multiple, *map(id, read))
        table = self._tables.get(key)
        if table is None or table.versions != _versions(read):
            reason = self._obstacle(base, arguments)
            if reason:
                self._off = True
                logger.warning("modulation='ahead' makes none: %s", reason)
                return None
            table = self._tables[key] = self._table(base, arguments, multiple, read)
        return Modulation(table.layout, table.values[step])

    def _obstacle(self, base: nn.Module, arguments: Mapping[str, Any]) -> str:
        if len(self._tables) >= MOST_TABLES:
            return f"{', '.join(self._family.modulation_inputs)} are other tensors in every step"
        if torch.is_autocast_enabled(arguments[self._family.latent_argument].device.type):
            return "autocast chooses the precision of every layer"
        # a strength given with the call is that of the forward's layers only while it runs
        if lora_scale(arguments) != 1:
            return "the call has a LoRA scale of its own"
        return weights_elsewhere(base)

    @torch.no_grad()
    def _table(
        self, base: nn.Module, arguments: Mapping[str, Any], multiple: int, read: tuple[torch.Tensor | None, ...]
    ) -> _Table:
        told = arguments[self._family.time_argument]
        times = self._times(told, multiple)[:, None].expand(-1, len(told))
        found = self._family.modulations(base, arguments, times)
        layout = tuple((path, result.shape[1]) for path, result in found.items())
        values = torch.cat(list(found.values()), dim=1).unflatten(0, times.shape)
        return _Table(layout, values, read, _versions(read))

    def _times(self, told: torch.Tensor, multiple: int) -> torch.Tensor:
        """What the transformer is told in every step at ``multiple``, (n,)."""
        if multiple == 1:
            timesteps = torch.tensor(self._timesteps, dtype=torch.float32, device=told.device)
            return self._family.told_times(timesteps, told.dtype)
        # in the arithmetic of the coarse paths, whose levels are 0-dim tensors
        dtype = torch.float32 if told.device.type == "mps" else torch.float64
        levels = torch.tensor(self._sigmas, dtype=dtype, device=told.device)
        if self._told_level == "low":
            levels = bands.low_scale(levels, multiple) * levels / noise_shrink(multiple)
        times = self._family.time_of(levels)
        assert isinstance(times, torch.Tensor)
        return times.to(told.dtype)


def weights_elsewhere(base: nn.Module) -> str:
    """Why layers cannot be called by themselves, outside the transformer's forward; empty if they can."""
    for name, layer in base.named_modules():
        registry = getattr(layer, "_diffusers_hook", None)
        moved = registry is not None and any("offload" in hook for hook in registry.hooks)
        if moved or hasattr(layer, "_hf_hook"):
            return f"{name or type(base).__name__} is offloaded"
    return ""


def _versions(tensors: Sequence[torch.Tensor | None]) -> tuple[int | None, ...]:
    # inference tensors count none
    return tuple(None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)
