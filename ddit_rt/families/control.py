"""What a ControlNet adds to a transformer: lists of residuals (B, N, d), one per token of the picture after a block.

The ControlNet itself runs full in every step. A coarse token gets the mean of the residuals of the full tokens that it
covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange

from ..granularity import Geometry, bands
from .base import ModelInputs, NotCoarseError


def check_residuals(arguments: Mapping[str, Any], geometry: Geometry, *names: str) -> None:
    """Refuses residuals that are not one per token of the latent.

    Args:
        arguments: Of a transformer call.
        geometry: Of its latent.
        *names: Arguments that hold residuals; they may be absent or None.

    Raises:
        NotCoarseError: naming the argument.
    """
    tokens = geometry.tokens(1)
    for name in names:
        for residual in arguments.get(name) or ():
            if residual.shape[1] != tokens:
                raise NotCoarseError(f"{name}: {residual.shape[1]} residuals for {tokens} tokens of the latent")


def coarse_residuals(call: ModelInputs, multiple: int, *names: str) -> dict[str, list[torch.Tensor]]:
    """The residuals of those arguments that are given, for coarse tokens: lists of (B, N/k², d)."""
    given = {name: call.arguments.get(name) for name in names}
    return {
        name: [token_means(residual, call.geometry, multiple) for residual in residuals]
        for name, residuals in given.items()
        if residuals is not None
    }


def token_means(tokens: torch.Tensor, geometry: Geometry, multiple: int) -> torch.Tensor:
    """(B, N, d) on the grid of a full step -> (B, N/k², d): the mean of the full tokens that a coarse one covers."""
    rows, columns = geometry.grid(1)
    plane = rearrange(tokens, "b (f h w) d -> b d f h w", h=rows, w=columns)
    grid = Geometry(tokens.shape[-1], geometry.frames, rows, columns, 1, geometry.ranks)
    return rearrange(bands.means(plane, grid, multiple), "b d f h w -> b (f h w) d")
