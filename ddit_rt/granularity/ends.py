"""A transformer's two ends, as a coarse run computes them: in one fused kernel each, or by layers in PyTorch.

A family runs its trunk between whatever ends it is given (``Family.run_patches``) and says where its own layers are
(``Family.own_ends``). What an end computes is decided here: :class:`PatchEmbedding` is the layers of one coarse size,
:class:`FusedEnds` the same in two kernels, and :class:`BandEnds` is band-split around the model's own layers, with the
k x k means on the way in, and upsampling, high band and residual on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import ops
from .geometry import Geometry
from .projections import PatchEmbedding


class NotFusedError(Exception):
    """The fused kernels cannot stand in for the layers here; the text says why. The step runs in PyTorch instead."""


class PatchEnds(Protocol):
    """Embedding and de-embedding around a transformer's trunk."""

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C_in, F, H, W), a condition's channels behind the latent's -> tokens (B, N, d), row-major."""
        ...

    def write(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Tokens (B, N, d) of a grid of frames, rows and columns -> (B, C_out, F, H, W)."""
        ...


def check_fused(latent: torch.Tensor, side: int) -> None:
    """Whether the kernels can work on a latent at all.

    Args:
        latent: (B, C, F, H, W).
        side: Of a coarse patch, in latent pixels.

    Raises:
        NotFusedError: they cannot; with the reason.
    """
    if latent.dtype not in ops.KERNEL_DTYPES:
        raise NotFusedError(f"the kernels take float32, bfloat16 and float16, not {latent.dtype}")
    if latent.untyped_storage().nbytes() // latent.element_size() >= 2**31:
        raise NotFusedError(f"the kernels count to 2^31 values, and a latent of {tuple(latent.shape)} lies in more")
    if side & (side - 1):
        raise NotFusedError(f"the kernels take patches whose side is a power of two, not {side}")
    if torch.is_autocast_enabled(latent.device.type):
        raise NotFusedError("autocast chooses the dtype of every layer")
    if torch.is_grad_enabled():
        raise NotFusedError("autograd records, and the kernels have no backward; use torch.no_grad()")


@dataclass(frozen=True)
class OwnEnds:
    """Views of a model's own embedding and de-embedding, in the memory where the model has them.

    Attributes:
        embed: (d, C_in, p, p).
        embed_bias: (d,) or None.
        deembed: (p, p, C_out, d).
        deembed_bias: (p, p, C_out) or None.
    """

    embed: torch.Tensor
    embed_bias: torch.Tensor | None
    deembed: torch.Tensor
    deembed_bias: torch.Tensor | None


class FusedEnds:
    """What a :class:`PatchEmbedding` computes, without gradients, in a kernel for each end.

    Args:
        embedding: Of one coarse size.
        backend: Of :mod:`ddit_rt.ops`.
    """

    def __init__(self, embedding: PatchEmbedding, backend: str) -> None:
        self._embedding = embedding
        self._backend = backend

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        own, side = self._embedding, self._embedding.side
        weight = own.embed.detach().view(len(own.embed), -1, side, side)
        options: dict[str, Any] = {"size_embedding": own.size_embedding.detach(), "backend": self._backend}
        return ops.patch_embed(pixels, weight, own.embed_bias.detach(), side, **options)

    def write(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        own, side = self._embedding, self._embedding.side
        weight = own.deembed.detach().unflatten(0, (-1, side, side)).permute(1, 2, 0, 3)
        bias = own.deembed_bias.detach().unflatten(0, (-1, side, side)).permute(1, 2, 0)
        return ops.patch_deembed(tokens, weight, bias, side, grid, backend=self._backend)


class BandEnds:
    """A model's own ends around the k x k means of a latent: up(gain·model(scale·down(latent))) + rest, cropped.

    Args:
        own: Of the model.
        multiple: k.
        rest: What :func:`ddit_rt.ops.band_rest` gave; that of a probe is as small as the means, and so is the result.
        probe: Whether it is that of a probe.
        geometry: Of the latent.
        backend: Of :mod:`ddit_rt.ops`.
    """

    def __init__(
        self, own: OwnEnds, multiple: int, rest: ops.BandRest, probe: bool, geometry: Geometry, backend: str
    ) -> None:
        self._own = own
        self._multiple = multiple
        self._rest = rest
        self._channels = geometry.channels
        self._patch = geometry.patch
        self._spread = 1 if probe else multiple
        self._backend = backend

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        own, channels = self._own, self._channels
        options: dict[str, Any] = {"mean_over": self._multiple, "backend": self._backend}
        extra = None
        if pixels.shape[1] > channels:
            # a condition is no noisy state: its means are taken as they are
            extra = ops.patch_embed(pixels[:, channels:], own.embed[:, channels:], None, self._patch, **options)
        latent, weight = pixels[:, :channels], own.embed[:, :channels]
        options |= {"scale": self._rest.scale, "extra": extra}
        return ops.patch_embed(latent, weight, own.embed_bias, self._patch, **options)

    def write(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        height, width = self._rest.rest.shape[3:]
        return ops.patch_deembed(
            tokens,
            self._own.deembed,
            self._own.deembed_bias,
            self._patch,
            grid,
            residual=self._rest.rest,
            scale=self._rest.gain,
            spread_over=self._spread,
            size=(height, width),
            backend=self._backend,
        )


class PlainEnds:
    """A model's own ends at its own patch size, as they are, in two kernels.

    Args:
        own: Of the model.
        geometry: Of the latent.
        backend: Of :mod:`ddit_rt.ops`.
    """

    def __init__(self, own: OwnEnds, geometry: Geometry, backend: str) -> None:
        self._own = own
        self._geometry = geometry
        self._backend = backend

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        own = self._own
        return ops.patch_embed(pixels, own.embed, own.embed_bias, self._geometry.patch, backend=self._backend)

    def write(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        own, size = self._own, (self._geometry.height, self._geometry.width)
        options: dict[str, Any] = {"size": size, "backend": self._backend}
        return ops.patch_deembed(tokens, own.deembed, own.deembed_bias, self._geometry.patch, grid, **options)
