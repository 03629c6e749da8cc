"""Runs a transformer between fused kernels in place of its own two ends, where that can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..families import Family, ModelInputs
from ..granularity import BandEnds, NotFusedError, PlainEnds, RunBands, Scalar, check_fused, pad_to_grid
from ..multiples import frames_of, side_of
from ..ops import BackendError, BandMemory, backend_of, band_rest
from ..runtime import sequence_ranks
from .transformer_call import TransformerCall

logger = logging.getLogger(__name__)

# multiple -> the transformer's forward
Forwards = Callable[[int], Callable[..., Any]]


class Fusing:
    """What kernels stand in for, and where they cannot.

    Args:
        family: Of the transformer.
        backend: See ``DDiTConfig.backend``.
    """

    def __init__(self, family: Family, backend: str) -> None:
        self.backend = backend
        self._family = family
        self._logged: set[str] = set()

    def is_possible(self, call: TransformerCall, multiple: int, own: bool) -> bool:
        """Whether kernels run, and can stand in for a transformer's ends; where they cannot, the log says why, once.

        Args:
            call: Of the transformer, with inputs.
            multiple: k.
            own: For the transformer's own ends; else for those of a coarse size.
        """
        inputs = call.inputs
        assert inputs is not None
        try:
            if backend_of(self.backend, inputs.latent.device) == "torch":
                return False
            if frames_of(multiple) > 1:
                raise NotFusedError("the kernels know no patches that span frames")
            check_fused(inputs.latent, side_of(multiple) * inputs.geometry.patch)
            if sequence_ranks(call.base) is not None:
                raise NotFusedError("the transformer's tokens are divided among devices")
            if own and call.process is not None:
                raise NotFusedError("the kernels know band-split of flows, and this model predicts noise or v")
            if own:
                self._family.own_ends(call.base, inputs)
        except (NotFusedError, BackendError) as error:
            if str(error) not in self._logged:
                self._logged.add(str(error))
                logger.warning("the transformer's ends run in PyTorch, not in fused kernels: %s", error)
            return False
        return True

    def full(self, base: nn.Module, inputs: ModelInputs, at: Forwards) -> torch.Tensor:
        """The prediction of a full step, (B, C, F, H, W) in the model's dtype."""
        ends = PlainEnds(self._family.own_ends(base, inputs), inputs.geometry, self.backend)
        return self._family.run_patches(base, at(1), inputs, inputs.latent, None, ends, 1, True)

    def bands(self, base: nn.Module, inputs: ModelInputs, at: Forwards, native: bool) -> RunBands:
        """How a path runs band-split around a transformer."""

        def run(latent: torch.Tensor, level: Scalar, multiple: int, memory: BandMemory) -> torch.Tensor:
            assert isinstance(level, torch.Tensor)  # as all that a captured graph takes
            geometry, family = inputs.geometry, self._family
            rows, columns = (side * geometry.patch for side in geometry.grid(multiple))
            rest = band_rest(latent, level, multiple, grid=(rows, columns), memory=memory, backend=self.backend)
            own, is_probe = family.own_ends(base, inputs), memory.high == "probe"
            ends = BandEnds(own, multiple, rest, is_probe, geometry, self.backend)
            # the kernels pad by themselves; a condition is padded for them to lie beside the latent
            pixels = latent if inputs.condition is None else pad_to_grid(latent, geometry, multiple)
            return family.run_patches(base, at(multiple), inputs, pixels, rest.level, ends, multiple, native)

        return run
