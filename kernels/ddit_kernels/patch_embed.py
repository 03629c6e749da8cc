"""Patchify and embed in one go: gather s x s patches of a latent, multiply by the embedding, add what belongs to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddit_kernels._common import unpack_latent


def scaled(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """``x * scale`` in float32 for a number, a one-element tensor, or one value per sample (B,); x itself for 1.0."""
    if isinstance(scale, torch.Tensor):
        return x.float() * scale.float().reshape(-1, *[1] * (x.dim() - 1))
    return x if scale == 1.0 else x.float() * scale


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def patch_embed_reference(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    extra: torch.Tensor | None = None,
    size_embedding: torch.Tensor | None = None,
    mean_over: int = 1,
    scale: float | torch.Tensor = 1.0,
    packed: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Plain PyTorch version of the kernel. See :func:`ddit_rt.ops.patch_embed`."""
    if packed is not None:
        latent = unpack_latent(latent, packed)
    if latent.dim() == 4:
        latent = latent.unsqueeze(2)
    batch, channels, frames, height, width = latent.shape
    side = patch_size * mean_over
    bottom, right = -height % side, -width % side
    if bottom or right:
        flat = latent.reshape(batch, channels * frames, height, width)
        latent = F.pad(flat, (0, right, 0, bottom), mode="replicate").unflatten(1, (channels, frames))
        height, width = height + bottom, width + right
    if mean_over > 1:
        blocks = (height // mean_over, mean_over, width // mean_over, mean_over)
        latent = latent.float().reshape(batch, channels, frames, *blocks).mean((4, 6))
        height, width = height // mean_over, width // mean_over
    latent = scaled(latent, scale)
    rows, columns = height // patch_size, width // patch_size
    patches = latent.reshape(batch, channels, frames, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames * rows * columns, -1)
    tokens = F.linear(patches.to(weight.dtype), weight.flatten(1), bias)
    if size_embedding is not None:
        tokens = tokens + size_embedding.to(tokens.dtype)
    return tokens if extra is None else tokens + extra.to(tokens.dtype)
