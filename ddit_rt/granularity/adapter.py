"""Embeddings of coarse patches: one module per multiple, made by PI-resize and, later, trained."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import AdapterMismatchError
from ..resize import pi_resize_deembed, pi_resize_embed


class PatchEmbedding(nn.Module):
    """Embedding and de-embedding for one multiple k of the patch size, with the vector that names the size.

    Layouts are the canonical ones of :func:`ddit_rt.granularity.geometry.patchify`: tokens (B, N, C·s·s), values inside a
    token ordered (channel, row, column), s = k·p.

    Args:
        embed_weight: (d, C_in, s, s).
        embed_bias: (d,) or None.
        deembed_weight: (s·s·C_out, d), rows ordered (row, column, channel).
        deembed_bias: (s·s·C_out,) or None.
    """

    def __init__(
        self,
        embed_weight: torch.Tensor,
        embed_bias: torch.Tensor | None,
        deembed_weight: torch.Tensor,
        deembed_bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.side = embed_weight.shape[2]
        width = embed_weight.shape[0]
        self.embed = nn.Parameter(embed_weight.flatten(1))
        self.embed_bias = nn.Parameter(torch.zeros_like(embed_weight[:, 0, 0, 0]) if embed_bias is None else embed_bias)
        self.deembed = nn.Parameter(_channel_major(deembed_weight, self.side))
        self.deembed_bias = nn.Parameter(
            torch.zeros_like(deembed_weight[:, 0])
            if deembed_bias is None
            else _channel_major(deembed_bias, self.side)
        )
        self.size_embedding = nn.Parameter(torch.zeros(width, dtype=embed_weight.dtype, device=embed_weight.device))

    @classmethod
    def from_base(
        cls,
        embed_weight: torch.Tensor,
        embed_bias: torch.Tensor | None,
        deembed_weight: torch.Tensor,
        deembed_bias: torch.Tensor | None,
        multiple: int,
    ) -> PatchEmbedding:
        """PI-resizes the base model's own embedding (d, C, p, p) and de-embedding (p·p·C, d), rows (row, column, channel)."""
        patch = embed_weight.shape[2]
        resized = pi_resize_deembed(deembed_weight.detach(), _detached(deembed_bias), multiple, patch_size=patch)
        return cls(pi_resize_embed(embed_weight.detach(), multiple), _clone(embed_bias), *resized)

    def tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, C_in·s·s) -> (B, N, d)."""
        if patches.shape[-1] != self.embed.shape[1]:
            raise AdapterMismatchError(
                f"patches of {patches.shape[-1]} values met an embedding made for {self.embed.shape[1]}."
            )
        return nn.functional.linear(patches, self.embed, self.embed_bias) + self.size_embedding

    def patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, d) -> (B, N, C_out·s·s)."""
        return nn.functional.linear(tokens, self.deembed, self.deembed_bias)


def _channel_major(rows: torch.Tensor, side: int) -> torch.Tensor:
    """Reorders rows (row, column, channel) to (channel, row, column)."""
    return rows.unflatten(0, (side * side, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()
