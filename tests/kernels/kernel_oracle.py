"""Slow, obvious implementations to hold the kernels against, in any precision, and where kernels can run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from ddit_kernels._common import HAS_TRITON, INTERPRETED

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EXAMPLES = 10 if CUDA else 25  # of property tests: a GPU compiles and tunes for each new signature
needs_kernels = pytest.mark.skipif(
    not (HAS_TRITON and (CUDA or INTERPRETED)), reason="kernels need a CUDA device, or TRITON_INTERPRET=1 on a CPU"
)


def unpack(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h*w, C*4) -> (B, C, 2h, 2w), pixel by pixel."""
    height, width = grid
    channels = tokens.shape[2] // 4
    latent = tokens.new_empty(tokens.shape[0], channels, 2 * height, 2 * width)
    for y in range(2 * height):
        for x in range(2 * width):
            latent[:, :, y, x] = tokens[:, y // 2 * width + x // 2, (y % 2) * 2 + x % 2 :: 4]
    return latent


def pack(latent: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`unpack`."""
    batch, channels, height, width = latent.shape
    tokens = latent.new_empty(batch, height // 2 * (width // 2), channels * 4)
    for y in range(height):
        for x in range(width):
            tokens[:, y // 2 * (width // 2) + x // 2, (y % 2) * 2 + x % 2 :: 4] = latent[:, :, y, x]
    return tokens


def patch_stds(increments: Sequence[torch.Tensor], size: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, N) standard deviations of the n-th difference of (B, C, [F,] H, W) increments, patch by patch."""
    order = len(increments)
    total = sum((-1) ** i * math.comb(order - 1, i) * increments[i].to(dtype) for i in range(order))
    assert isinstance(total, torch.Tensor)
    if total.dim() == 4:
        total = total.unsqueeze(2)
    _, _, frames, height, width = total.shape
    return torch.stack(
        [
            total[:, :, f, y : y + size, x : x + size].flatten(1).var(1, correction=0).sqrt()
            for f in range(frames)
            for y in range(0, height, size)
            for x in range(0, width, size)
        ],
        1,
    )


def evolution(
    increments: Sequence[torch.Tensor], sizes: Sequence[int], quantile: float, dtype: torch.dtype
) -> torch.Tensor:
    """(B, S) quantiles, with torch.quantile."""
    return torch.stack([torch.quantile(patch_stds(increments, size, dtype), quantile, dim=1) for size in sizes], 1)


def embed(latent, weight, bias, size, extra, size_embedding, mean_over, scale, dtype):
    """Tokens patch by patch, everything in ``dtype``; ``latent`` unpacked, ``scale`` (B,) or a number."""
    if latent.dim() == 4:
        latent = latent.unsqueeze(2)
    if weight.dim() == 5:
        weight = weight.squeeze(2)
    latent, weight = latent.to(dtype), weight.to(dtype)
    _, _, frames, height, width = latent.shape
    side = size * mean_over
    tokens = []
    for f in range(frames):
        for top in range(0, height, side):
            for left in range(0, width, side):
                rows = [min(top + i, height - 1) for i in range(side)]
                columns = [min(left + i, width - 1) for i in range(side)]
                patch = latent[:, :, f][:, :, rows][..., columns]
                patch = patch.unflatten(3, (size, mean_over)).unflatten(2, (size, mean_over)).mean((3, 5))
                patch = patch * (scale.to(dtype).reshape(-1, 1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
                tokens.append(patch.flatten(1) @ weight.flatten(1).T)
    result = torch.stack(tokens, 1)
    for term in (bias, size_embedding, extra):
        result = result if term is None else result + term.to(dtype)
    return result


def deembed(tokens, weight, bias, size, grid, residual, scale, spread_over, crop, dtype):
    """Latent (B, C, [F,] H, W) patch by patch, everything in ``dtype``."""
    frames, height, width = (1, *grid) if len(grid) == 2 else grid
    values = tokens.to(dtype) @ weight.to(dtype).T
    values = values if bias is None else values + bias.to(dtype)
    values = values * (scale.to(dtype).reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
    channels, side = weight.shape[0] // size**2, size * spread_over
    latent = torch.empty(
        tokens.shape[0], channels, frames, height * side, width * side, dtype=dtype, device=tokens.device
    )
    for place in range(frames * height * width):
        f, y, x = place // (height * width), place // width % height, place % width
        patch = values[:, place].reshape(-1, size, size, channels).permute(0, 3, 1, 2)
        patch = patch.repeat_interleave(spread_over, 2).repeat_interleave(spread_over, 3)
        latent[:, :, f, y * side : (y + 1) * side, x * side : (x + 1) * side] = patch
    latent = latent if crop is None else latent[..., : crop[0], : crop[1]]
    latent = latent.squeeze(2) if len(grid) == 2 else latent
    return latent if residual is None else latent + residual.to(dtype)


def assert_as_good(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, atol: float) -> None:
    """Largest error against float64 at most twice that of plain PyTorch, plus ``atol``.

    The interpreter truncates to bfloat16 where hardware rounds, so it may be off by one unit in the last place.
    """
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    allowed = torch.full_like(exact, 2 * float((plain.double() - exact).abs().max()) + atol)
    if INTERPRETED and actual.dtype == torch.bfloat16:
        allowed += exact.abs() * 2.0**-7
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


def strided(shape: Sequence[int], layout: int, generator: torch.Generator) -> torch.Tensor:
    """Random tensor of ``shape`` whose memory is contiguous (0), transposed (1), or every second value (2)."""
    if layout == 1:
        return torch.randn(*reversed(shape), generator=generator).permute(*reversed(range(len(shape))))
    if layout == 2:
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    return torch.randn(*shape, generator=generator)


def vector(values: torch.Tensor, layout: int) -> torch.Tensor:
    """(N,) contiguous (0), every third value of a longer one (1), or the first value for all (2)."""
    if layout == 1:
        wide = torch.full((3 * len(values),), float("nan"), dtype=values.dtype, device=values.device)
        wide[::3] = values
        return wide[::3]
    return values[:1].expand(len(values)) if layout == 2 else values
