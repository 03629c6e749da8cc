"""How a latent divides into tokens at each multiple of the patch size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange

from ..multiples import frames_of, side_of


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
        side = side_of(multiple) * self.patch
        rows, columns = -(-self.height // side), -(-self.width // side)
        if multiple == 1 or self.ranks == 1:
            return rows, columns
        larger = ((rows + i, columns + j) for i in range(self.ranks) for j in range(self.ranks))
        frames = self.frames_at(multiple)
        return min((g for g in larger if frames * g[0] * g[1] % self.ranks == 0), key=lambda g: g[0] * g[1])

    def frames_at(self, multiple: int) -> int:
        """Frames of tokens at ``multiple``, padding included."""
        return -(-self.frames // frames_of(multiple))

    @cache  # noqa: B019 (a handful of geometries live as long as the process)
    def tokens(self, multiple: int) -> int:
        """Tokens per sample at ``multiple``."""
        rows, columns = self.grid(multiple)
        return self.frames_at(multiple) * rows * columns

    @cache  # noqa: B019 (a handful of geometries live as long as the process)
    def padding(self, multiple: int) -> tuple[int, int]:
        """Latent pixels to add at the bottom and at the right so that ``multiple`` divides the grid."""
        rows, columns = self.grid(multiple)
        side = side_of(multiple) * self.patch
        return rows * side - self.height, columns * side - self.width

    def frame_padding(self, multiple: int) -> int:
        """Latent frames to add at the end so that ``multiple`` divides them."""
        return self.frames_at(multiple) * frames_of(multiple) - self.frames


def coarse_centres(count: int, multiple: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Coordinates of ``count`` coarse patches, in units of full patches: the centre of the full patches each covers.

    Fine patch i has coordinate i, so coarse patch j covers k·j .. k·j + k - 1 and its centre is k·j + (k - 1)/2.

    Returns:
        float32 (count,).
    """
    return torch.arange(count, device=device, dtype=torch.float32) * multiple + (multiple - 1) / 2


def patchify(latent: torch.Tensor, side: int, span: int = 1) -> torch.Tensor:
    """(B, C, F, H, W) -> (B, (F/span)·(H/s)·(W/s), C·span·s·s): row-major tokens, channel-major values in a token."""
    return rearrange(latent, "b c (f g) (h p) (w q) -> b (f h w) (c g p q)", g=span, p=side, q=side)


def unpatchify(tokens: torch.Tensor, side: int, frames: int, rows: int, columns: int, span: int = 1) -> torch.Tensor:
    """Inverse of :func:`patchify`: (B, N, C·span·s·s) -> (B, C, frames·span, rows·s, columns·s)."""
    sizes = {"f": frames, "h": rows, "w": columns, "g": span, "p": side, "q": side}
    return rearrange(tokens, "b (f h w) (c g p q) -> b c (f g) (h p) (w q)", **sizes)
