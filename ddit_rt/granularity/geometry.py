"""How a latent divides into tokens at each multiple of the patch size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Geometry:
    """The grid of a latent in canonical layout (B, C, F, H, W).

    Attributes:
        channels: C of the prediction.
        frames: F in latent frames (1 for images).
        height, width: In latent pixels.
        patch: The model's own patch size p, in latent pixels.
    """

    channels: int
    frames: int
    height: int
    width: int
    patch: int

    def grid(self, multiple: int) -> tuple[int, int]:
        """StepExecutor and columns of tokens at ``multiple``, padding included."""
        side = multiple * self.patch
        return -(-self.height // side), -(-self.width // side)

    def tokens(self, multiple: int) -> int:
        """Tokens per sample at ``multiple``."""
        rows, columns = self.grid(multiple)
        return self.frames * rows * columns

    def padding(self, multiple: int) -> tuple[int, int]:
        """Latent pixels to add at the bottom and at the right so that ``multiple`` divides the grid."""
        rows, columns = self.grid(multiple)
        side = multiple * self.patch
        return rows * side - self.height, columns * side - self.width


def pad_to_grid(latent: torch.Tensor, geometry: Geometry, multiple: int) -> torch.Tensor:
    """Pads (B, C, F, H, W) by edge replication to a grid that ``multiple`` divides."""
    bottom, right = geometry.padding(multiple)
    if not bottom and not right:
        return latent
    # replicate padding takes 4-D input; frames ride along as channels
    padded = F.pad(latent.flatten(1, 2), (0, right, 0, bottom), mode="replicate")
    return padded.unflatten(1, latent.shape[1:3])


def crop_to_latent(latent: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Undoes :func:`pad_to_grid`."""
    return latent[..., : geometry.height, : geometry.width]


def coarse_centres(count: int, multiple: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Coordinates of ``count`` coarse patches, in units of full patches: the centre of the full patches each covers.

    Fine patch i has coordinate i, so coarse patch j covers k·j .. k·j + k - 1 and its centre is k·j + (k - 1)/2.

    Returns:
        float32 (count,).
    """
    return torch.arange(count, device=device, dtype=torch.float32) * multiple + (multiple - 1) / 2


def patchify(latent: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, F, H, W) -> (B, F·(H/s)·(W/s), C·s·s): row-major tokens, channel-major values inside a token."""
    batch, channels, frames, height, width = latent.shape
    blocks = latent.reshape(batch, channels, frames, height // side, side, width // side, side)
    return blocks.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * side * side)


def unpatchify(tokens: torch.Tensor, side: int, frames: int, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`patchify`: (B, N, C·s·s) -> (B, C, F, rows·s, columns·s)."""
    blocks = tokens.reshape(tokens.shape[0], frames, rows, columns, -1, side, side)
    return blocks.permute(0, 4, 1, 2, 5, 3, 6).reshape(
        tokens.shape[0], blocks.shape[4], frames, rows * side, columns * side
    )
