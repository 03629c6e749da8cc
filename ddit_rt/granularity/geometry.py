"""How a latent divides into tokens at each multiple of the patch size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange


@dataclass(frozen=True)
class Geometry:
    """The grid of a latent in canonical layout (B, C, F, H, W).

    Attributes:
        channels: C of the prediction.
        frames: F in latent frames (1 for images).
        height, width: In latent pixels.
        patch: The model's own patch size p, in latent pixels.
        ranks: How many share a sequence, each with as many tokens: coarse grids are padded to a multiple of it.
    """

    channels: int
    frames: int
    height: int
    width: int
    patch: int
    ranks: int = 1

    @cache  # noqa: B019 (a handful of geometries live as long as the process)
    def grid(self, multiple: int) -> tuple[int, int]:
        """Rows and columns of tokens at ``multiple``, padding included."""
        side = multiple * self.patch
        rows, columns = -(-self.height // side), -(-self.width // side)
        if multiple == 1 or self.ranks == 1:
            return rows, columns
        larger = ((rows + i, columns + j) for i in range(self.ranks) for j in range(self.ranks))
        return min((g for g in larger if self.frames * g[0] * g[1] % self.ranks == 0), key=lambda g: g[0] * g[1])

    @cache  # noqa: B019 (a handful of geometries live as long as the process)
    def tokens(self, multiple: int) -> int:
        """Tokens per sample at ``multiple``."""
        rows, columns = self.grid(multiple)
        return self.frames * rows * columns

    @cache  # noqa: B019 (a handful of geometries live as long as the process)
    def padding(self, multiple: int) -> tuple[int, int]:
        """Latent pixels to add at the bottom and at the right so that ``multiple`` divides the grid."""
        rows, columns = self.grid(multiple)
        side = multiple * self.patch
        return rows * side - self.height, columns * side - self.width


def coarse_centres(count: int, multiple: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Coordinates of ``count`` coarse patches, in units of full patches: the centre of the full patches each covers.

    Fine patch i has coordinate i, so coarse patch j covers k·j .. k·j + k - 1 and its centre is k·j + (k - 1)/2.

    Returns:
        float32 (count,).
    """
    return torch.arange(count, device=device, dtype=torch.float32) * multiple + (multiple - 1) / 2


def patchify(latent: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, F, H, W) -> (B, F·(H/s)·(W/s), C·s·s): row-major tokens, channel-major values inside a token."""
    return rearrange(latent, "b c f (h p) (w q) -> b (f h w) (c p q)", p=side, q=side)


def unpatchify(tokens: torch.Tensor, side: int, frames: int, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`patchify`: (B, N, C·s·s) -> (B, C, F, rows·s, columns·s)."""
    sizes = {"f": frames, "h": rows, "w": columns, "p": side, "q": side}
    return rearrange(tokens, "b (f h w) (c p q) -> b c f (h p) (w q)", **sizes)
