"""What the two matrix-product kernels share: tile shapes, accepted dtypes, and how they are scaled."""

from __future__ import annotations

from typing import Any

import torch

from ddit_kernels._common import INTERPRETED, memory_span, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tuned(kernel: Any, *tiles: tuple[int, int, int, int, int]) -> Any:
    """``kernel``, choosing its tiles by measurement at the first call with a new problem size (kept on disk).

    That call must not be captured in a CUDA graph: run once before. The interpreter cannot measure and gets one small
    tile; float32, which keeps three TF32 terms per value in registers, gets one as well.

    Args:
        kernel: a Triton kernel with arguments ``weight``, ``count``, ``features``, ``depth``.
        tiles: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) for 16-bit weights.
    """

    def configuration(tile: tuple[int, int, int, int, int]) -> Any:
        rows, columns, depth, warps, stages = tile
        blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    single = [configuration((32, 32, 32, 4, 1) if INTERPRETED else (32, 64, 32, 4, 2))]
    if INTERPRETED:
        return triton.autotune(configs=single, key=[])(kernel)

    def by_dtype(configs: list[Any], _: Any, **arguments: Any) -> list[Any]:
        return configs[:1] if arguments["weight"].dtype == torch.float32 else configs[1:]

    return triton.autotune(
        configs=single + [configuration(tile) for tile in tiles],
        key=["count", "features", "depth"],
        prune_configs_by={"early_config_prune": by_dtype},
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
        return {"scales": scales, "scale_stride": int(scales.numel() > 1), "factor": 1.0, "SCALE": 2}
    return {"scales": None, "scale_stride": 0, "factor": scale, "SCALE": int(scale != 1.0)}


def scaled(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """``x * scale`` in float32 for a number, a one-element tensor, or one value per sample (B,); x itself for 1.0."""
    if isinstance(scale, torch.Tensor):
        return x.float() * scale.float().reshape(-1, *[1] * (x.dim() - 1))
    return x if scale == 1.0 else x.float() * scale
