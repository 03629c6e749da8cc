"""What the two matrix-product kernels share: tiles, accepted dtypes, where pixels lie, and how they are scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ddit_kernels._common import INTERPRETED, memory_span, tl, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def line_of(strides, base, channel, y, SPLIT: tl.constexpr, ALIGN: tl.constexpr):
    """Offset of row ``y``'s begin; ``strides`` as of :func:`aligned_strides`, ``base`` in the same units."""
    offset = base + channel * strides[1] + y // SPLIT * strides[3]
    if SPLIT > 1:
        offset += y % SPLIT * strides[4]
    return offset * ALIGN


@triton.jit
def column_of(strides, x, SPLIT: tl.constexpr):
    """Offset of column ``x`` from its row's begin."""
    if SPLIT > 1:
        return x // SPLIT * strides[5] + x % SPLIT * strides[6]
    return x * strides[5]


def aligned_strides(strides: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """What the compiler needs to know to read a run of pixels in one instruction: that all runs begin at multiples.

    Triton learns of integers no more than whether 16 divides them, and rows of Wan's latents are 104 pixels long.

    Args:
        strides: Of a latent, as :func:`ddit_kernels._common.split_strides` gives them.

    Returns:
        A power of two up to 8, and the strides with all but the columns' divided by it.
    """
    align = math.gcd(8, *strides[:5])
    return align, (*(stride // align for stride in strides[:5]), *strides[5:])


Tile: TypeAlias = tuple[int, int, int, int, int]
"""BLOCK_M, BLOCK_N, BLOCK_K, warps, stages."""


def tuned(kernel: Any, tiles: Sequence[Tile], repeating: Sequence[Tile], operand: str, most: int) -> Any:
    """``kernel``, choosing its tiles by measurement at the first call with a new problem size (kept on disk).

    That call must not be captured in a CUDA graph: run once before. The interpreter cannot measure and gets one small
    tile; float32, which keeps three TF32 terms per value in registers, gets one as well.

    Args:
        kernel: a Triton kernel with arguments ``weight``, ``count``, ``features``, ``depth``, ``S``, ``REPEAT``.
        tiles: for 16-bit weights.
        repeating: the same where every value stands for REPEAT x REPEAT pixels. A row of these is held at once, address
            and all, so that tiles have to be smaller.
        operand: ``"BLOCK_K"`` or ``"BLOCK_N"``, the other side of the tile, beside BLOCK_M, that has pixels.
        most: pixels that one thread may hold, or it would spill registers.
    """

    def configuration(tile: Tile) -> Any:
        rows, columns, depth, warps, stages = tile
        blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    if INTERPRETED:
        return triton.autotune(configs=[configuration((32, 32, 128, 4, 1))], key=[])(kernel)

    single = [configuration((32, 64, 32, 4, 2)), configuration((32, 32, 16, 4, 2))]
    once, several = ([configuration(tile) for tile in group] for group in (tiles, repeating))

    def fitting(_: list[Any], __: Any, **arguments: Any) -> list[Any]:
        repeat, is_float = arguments["REPEAT"], arguments["weight"].dtype == torch.float32
        if repeat == 1:
            return single[:1] if is_float else once

        def held(config: Any) -> float:
            return config.kwargs["BLOCK_M"] * config.kwargs[operand] * repeat / (32 * config.num_warps)

        return single[1:] if is_float else [config for config in several if held(config) <= most]

    return triton.autotune(
        configs=single + once + several,
        key=["count", "features", "depth", "S", "REPEAT"],
        prune_configs_by={"early_config_prune": fitting},
        cache_results=True,
    )(kernel)


def gemm_unsupported(patch_size: int, repeat: int, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these arguments, ``None`` if they can."""
    if patch_size & (patch_size - 1) or repeat & (repeat - 1):
        return f"the kernel takes patch sizes and k x k blocks that are powers of two, got {patch_size} and {repeat}."
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"the kernel takes float32, bfloat16 and float16, got {tensor.dtype}."
        if tensor is not None and memory_span(tensor.shape, tensor.stride()) >= 2**31:
            return f"a tensor of shape {tuple(tensor.shape)} spans more than 2^31 values in memory."
    return None


def scale_arguments(scale: float, scales: torch.Tensor | None) -> dict[str, Any]:
    """Kernel arguments for a factor known on the host, or for one on the device that may change between replays."""
    if scales is not None:
        stride = 0 if scales.numel() == 1 else scales.stride(0)
        return {"scales": scales, "scale_stride": stride, "factor": 1.0, "SCALE": 2}
    return {"scales": None, "scale_stride": 0, "factor": scale, "SCALE": int(scale != 1.0)}


def scaled(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """``x * scale`` in float32 for a number, a one-element tensor, or one value per sample (B,); x itself for 1.0."""
    if isinstance(scale, torch.Tensor):
        return x.float() * scale.float().reshape(-1, *[1] * (x.dim() - 1))
    return x if scale == 1.0 else x.float() * scale
