"""The linear layers at a transformer's two ends, in one layout for all models, and PI-resized to k times the patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import nn

from ..errors import AdapterMismatchError
from ..multiples import frames_of, side_of
from ..resize import pi_resize_deembed, pi_resize_embed
from .geometry import patchify, unpatchify


@dataclass(frozen=True)
class PatchProjections:
    """A transformer's own embedding and de-embedding in canonical layout.

    Attributes:
        embed_weight: (d, C_in, p, p).
        embed_bias: (d,) or None.
        deembed_weight: (p·p·C_out, d), rows ordered (row, column, channel).
        deembed_bias: (p·p·C_out,) or None.
    """

    embed_weight: torch.Tensor
    embed_bias: torch.Tensor | None
    deembed_weight: torch.Tensor
    deembed_bias: torch.Tensor | None

    @property
    def channels(self) -> int:
        """C_out: channels of the latent; C_in holds them and, after them, the channels of a condition."""
        return self.deembed_weight.shape[0] // self.embed_weight.shape[2] ** 2


class PatchEmbedding(nn.Module):
    """Embedding and de-embedding for one multiple k of the patch size, with the vector that names the size.

    Layouts are the canonical ones of :func:`ddit_rt.granularity.geometry.patchify`: tokens (B, N, C·s·s), values inside
    a token ordered (channel, row, column), s = k·p.

    Args:
        embed_weight: (d, C_in, s, s).
        embed_bias: (d,) or None.
        deembed_weight: (s·s·C_out, d), rows ordered (row, column, channel).
        deembed_bias: (s·s·C_out,) or None.
        span: Frames of a patch, each with channels of its own in the above.
    """

    def __init__(
        self,
        embed_weight: torch.Tensor,
        embed_bias: torch.Tensor | None,
        deembed_weight: torch.Tensor,
        deembed_bias: torch.Tensor | None,
        span: int = 1,
    ) -> None:
        super().__init__()
        self.span = span
        self.side = embed_weight.shape[2]
        width = embed_weight.shape[0]
        self.embed = nn.Parameter(embed_weight.flatten(1))
        self.embed_bias = nn.Parameter(torch.zeros_like(embed_weight[:, 0, 0, 0]) if embed_bias is None else embed_bias)
        self.deembed = nn.Parameter(_channel_major(deembed_weight, self.side))
        self.deembed_bias = nn.Parameter(
            torch.zeros_like(deembed_weight[:, 0]) if deembed_bias is None else _channel_major(deembed_bias, self.side)
        )
        self.size_embedding = nn.Parameter(torch.zeros(width, dtype=embed_weight.dtype, device=embed_weight.device))

    @classmethod
    def from_base(cls, ends: PatchProjections, multiple: int) -> PatchEmbedding:
        """The base model's own ends, PI-resized: exact on patches that are bilinear upsamplings.

        Along time a patch's frames are alike: the embedding is that of their mean, and the de-embedding repeats itself.
        """
        patch, side, span = ends.embed_weight.shape[2], side_of(multiple), frames_of(multiple)
        weight, bias = pi_resize_deembed(
            ends.deembed_weight.detach(), _detached(ends.deembed_bias), side, patch_size=patch
        )
        embed = pi_resize_embed(ends.embed_weight.detach(), side)
        if span > 1:
            embed = repeat(embed, "d c p q -> d (c g) p q", g=span) / span
            channels = ends.channels
            weight = repeat(weight, "(s c) d -> (s c g) d", c=channels, g=span)
            bias = None if bias is None else repeat(bias, "(s c) -> (s c g)", c=channels, g=span)
        return cls(embed, _clone(ends.embed_bias), weight, bias, span)

    @classmethod
    def of_means(cls, ends: PatchProjections, multiple: int, extra: int = 0) -> PatchEmbedding:
        """The base model's own ends, PI-resized for nearest-neighbour upsampling.

        The pseudo-inverse of that upsampling is the mean, so the embedding is the base embedding of the k x k means,
        and the de-embedding repeats the base prediction k x k times.

        Args:
            ends: Of the base model.
            multiple: k.
            extra: Input channels of weight zero, inserted after the latent's own.

        Returns:
            De-embedded patches have 2·C_out channels: the base prediction, and a second one of weight zero.
        """
        weight = ends.embed_weight.detach()
        latent, condition = weight[:, : ends.channels], weight[:, ends.channels :]
        unused = weight.new_zeros(weight.shape[0], extra, *weight.shape[2:])
        inputs = torch.cat([latent, unused, condition], dim=1)
        joined = repeat(inputs, "d c p q -> d c (p k) (q l)", k=multiple, l=multiple) / multiple**2
        patch = weight.shape[2]

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            sizes = {"p": patch, "q": patch, "k": multiple, "l": multiple}
            repeated = repeat(tensor.detach(), "(p q c) ... -> (p k q l) c ...", **sizes)
            return torch.cat([repeated, torch.zeros_like(repeated)], dim=1).flatten(0, 1)

        bias = None if ends.deembed_bias is None else rows(ends.deembed_bias)
        return cls(joined, _clone(ends.embed_bias), rows(ends.deembed_weight), bias)

    @torch.no_grad()
    def renew(self, other: PatchEmbedding) -> None:
        """Takes another one's weights into the memory of its own, which captured graphs may read."""
        for own, fresh in zip(self.parameters(), other.parameters()):
            own.copy_(fresh)

    def tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, C_in·s·s) -> (B, N, d)."""
        if patches.shape[-1] != self.embed.shape[1]:
            raise AdapterMismatchError(
                f"patches of {patches.shape[-1]} values met an embedding made for {self.embed.shape[1]}."
            )
        embedded = nn.functional.linear(patches, self.embed, self.embed_bias)
        # the sum would promote a token stream that autocast keeps in half precision
        return embedded + self.size_embedding.to(embedded.dtype)

    def patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, d) -> (B, N, C_out·s·s)."""
        return nn.functional.linear(tokens, self.deembed, self.deembed_bias)

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C_in, F, H, W), which the patches divide -> (B, N, d)."""
        return self.tokens(patchify(pixels, self.side, self.span))

    def write(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """(B, N, d) of a grid of frames, rows and columns -> (B, C_out, F, rows·s, columns·s)."""
        return unpatchify(self.patches(tokens), self.side, *grid, self.span)


def _channel_major(rows: torch.Tensor, side: int) -> torch.Tensor:
    """Reorders rows (row, column, channel) to (channel, row, column)."""
    return rearrange(rows, "(s c) ... -> (c s) ...", s=side * side).contiguous()


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()
