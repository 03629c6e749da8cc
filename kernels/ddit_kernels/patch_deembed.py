"""Project tokens and put their s x s patches back into the latent in one go, with scale and residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddit_kernels._common import pack_latent
from ddit_kernels.patch_embed import scaled

# --- PyTorch reference ------------------------------------------------------------------------------------------------


def patch_deembed_reference(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    grid: tuple[int, ...],
    residual: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    spread_over: int = 1,
    size: tuple[int, int] | None = None,
    packed: bool = False,
) -> torch.Tensor:
    """Plain PyTorch version of the kernel. See :func:`ddit_rt.ops.patch_deembed`."""
    frames, rows, columns = (1, *grid) if len(grid) == 2 else grid
    batch, channels = tokens.shape[0], weight.shape[0] // patch_size**2
    values = scaled(F.linear(tokens.to(weight.dtype), weight, bias), scale).to(weight.dtype)
    patches = values.reshape(batch, frames, rows, columns, patch_size, patch_size, channels)
    latent = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(
        batch, channels, frames, rows * patch_size, columns * patch_size
    )
    if spread_over > 1:
        latent = latent.repeat_interleave(spread_over, 3).repeat_interleave(spread_over, 4)
    if size is not None:
        latent = latent[..., : size[0], : size[1]]
    if len(grid) == 2:
        latent = latent.squeeze(2)
    if packed:
        latent = pack_latent(latent)
    return latent.contiguous() if residual is None else latent + residual
