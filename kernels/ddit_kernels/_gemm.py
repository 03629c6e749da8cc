"""What the two matrix-product kernels share: tile shapes, accepted dtypes, and how they are scaled."""

from __future__ import annotations

from typing import Any

import torch

from ddit_kernels._common import INTERPRETED, sample_span, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def configurations() -> list[Any]:
    """Tile shapes to choose from by measurement; the interpreter, which cannot measure, gets a single small one.

    All stay below 100 KB of shared memory in 16 bits, so that one list serves consumer and data-centre GPUs.
    """
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=1)]
    return [
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3),
    ]


def gemm_unsupported(patch_size: int, repeat: int, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these arguments, ``None`` if they can."""
    if patch_size & (patch_size - 1) or repeat & (repeat - 1):
        return f"the kernel takes patch sizes and k x k blocks that are powers of two, got {patch_size} and {repeat}."
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"the kernel takes float32, bfloat16 and float16, got {tensor.dtype}."
        if tensor is not None and sample_span(tensor) >= 2**31:
            return f"a sample of shape {tuple(tensor.shape[1:])} spans more than 2^31 values in memory."
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
