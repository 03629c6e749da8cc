"""Project tokens and put their s x s patches back into the latent in one launch, with scale and residual.

A matrix product that stores its result where the latent wants it. The rows of the weight are read in the order in which
the latent lies in memory, (channel, row, column), so that no result has to be shuffled afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import library

from ddit_kernels._common import INTERPRETED, Launch, latent_shape, pack_latent, split_strides, tl, triton
from ddit_kernels._gemm import aligned_strides, column_of, line_of, scale_arguments, scaled, tuned
from ddit_kernels._workspace import zeroed

MIN_TILE = 32 * 32

# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _deembed_kernel(
    tokens,
    weight,
    bias,
    residual,
    scales,
    latent,
    partials,  # (PARTS, tiles, BLOCK_M * BLOCK_N)
    tickets,  # one per tile, zero before and after
    token_strides,  # (batch, token, feature)
    weight_strides,  # between rows of it: (pixel, channel)
    bias_strides,  # same order
    strides,  # of the latent: (batch, channel, frame, row block, row) over ALIGN, then (column block, column)
    residual_strides,  # same order, over RESIDUAL_ALIGN
    scale_stride,
    factor,
    count,  # tokens of all samples
    per_sample,
    rows,
    columns,
    height,
    width,
    features,  # C * S * S
    depth,
    S: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the depth of one tile
    REPEAT: tl.constexpr,  # k: a value goes to k x k pixels
    SPLIT: tl.constexpr,  # 2: a packed token holds 2 x 2 pixels; 1: plain strides
    ALIGN: tl.constexpr,
    RESIDUAL_ALIGN: tl.constexpr,
    EXACT_ROWS: tl.constexpr,  # nothing is cropped at the bottom
    EXACT_COLUMNS: tl.constexpr,  # nor at the right
    SCALE: tl.constexpr,  # 0: none, 1: factor, 2: scales
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter cannot multiply bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_mask = token < count
    feature_mask = feature < features
    sample = token // per_sample
    place = token % per_sample
    # features are ordered (channel, row, column) as pixels lie in memory, whatever order the weight's rows have
    channel = feature // (S * S)
    pixel = feature % (S * S)
    line = weight + pixel * weight_strides[0] + channel * weight_strides[1]

    base = sample.to(tl.int64) * token_strides[0] + place.to(tl.int64) * token_strides[1]
    part = tl.cdiv(tl.cdiv(depth, PARTS), BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, depth)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        inside = (index < end)[None, :]
        left = tl.load(tokens + base[:, None] + (index * token_strides[2])[None, :], token_mask[:, None] & inside, 0.0)
        right = tl.load(line[:, None] + index[None, :], feature_mask[:, None] & inside, 0.0)
        left = left.to(weight.dtype.element_ty)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        product = tl.dot(left, tl.trans(right), product, input_precision="tf32x3")

    if PARTS > 1:
        # Few tokens make few tiles, too few to fill a GPU. The last program of a tile to finish adds up all parts, in
        # their order, so that the sum does not depend on which one that is.
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partials + (tl.program_id(2) * tiles + tile) * (BLOCK_M * BLOCK_N) + cell, product)
        tl.debug_barrier()  # orders the whole program's stores before the one thread that takes the ticket
        ticket = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu")
        if ticket != PARTS - 1:
            return
        tl.debug_barrier()
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for one in range(PARTS):
            product += tl.load(partials + (one * tiles + tile) * (BLOCK_M * BLOCK_N) + cell, cache_modifier=".cg")
        tl.atomic_xchg(tickets + tile, 0)

    if BIAS:
        of_bias = pixel * bias_strides[0] + channel * bias_strides[1]
        product += tl.load(bias + of_bias, feature_mask, 0.0).to(tl.float32)[None, :]
    if SCALE == 1:
        product *= factor
    if SCALE == 2:
        product *= tl.load(scales + sample * scale_stride, token_mask, 0.0).to(tl.float32)[:, None]

    frame = place // (rows * columns)
    top = place // columns % rows * (S * REPEAT)
    left_edge = place % columns * (S * REPEAT)
    start = sample * strides[0] + frame * strides[2]
    residual_start = sample * residual_strides[0] + frame * residual_strides[2]
    mask = token_mask[:, None] & feature_mask[None, :]
    if REPEAT == 1:
        y = top[:, None] + (pixel // S)[None, :]
        x = left_edge[:, None] + (pixel % S)[None, :]
        if not EXACT_ROWS:
            mask &= y < height
        if not EXACT_COLUMNS:
            mask &= x < width
        where = line_of(strides, start[:, None], channel[None, :], y, SPLIT, ALIGN) + column_of(strides, x, SPLIT)
        if RESIDUAL:
            other = line_of(residual_strides, residual_start[:, None], channel[None, :], y, SPLIT, RESIDUAL_ALIGN)
            product += tl.load(residual + other + column_of(residual_strides, x, SPLIT), mask, 0.0).to(tl.float32)
        tl.store(latent + where, product.to(latent.dtype.element_ty), mask)
    else:
        x = left_edge[:, None, None] + (pixel % S * REPEAT)[None, :, None] + tl.arange(0, REPEAT)[None, None, :]
        for row in range(REPEAT):
            y = top[:, None] + (pixel // S * REPEAT + row)[None, :]
            within = mask
            if not EXACT_ROWS:
                within = mask & (y < height)
            run = within[:, :, None]
            if not EXACT_COLUMNS:
                run = run & (x < width)
            where = line_of(strides, start[:, None], channel[None, :], y, SPLIT, ALIGN)[:, :, None]
            where += column_of(strides, x, SPLIT)
            result = tl.broadcast_to(product[:, :, None], (BLOCK_M, BLOCK_N, REPEAT))
            if RESIDUAL:
                other = line_of(residual_strides, residual_start[:, None], channel[None, :], y, SPLIT, RESIDUAL_ALIGN)
                other = other[:, :, None] + column_of(residual_strides, x, SPLIT)
                result += tl.load(residual + other, tl.broadcast_to(run, result.shape), 0.0).to(tl.float32)
            tl.store(latent + where, result.to(latent.dtype.element_ty), tl.broadcast_to(run, result.shape))


_TILES = (64, 64, 64, 8, 4), (64, 32, 64, 4, 4), (32, 64, 64, 4, 3), (32, 32, 128, 4, 4)
_SPREAD_TILES = (64, 64, 64, 8, 4), (64, 32, 64, 8, 4), (32, 32, 64, 4, 4), (32, 32, 128, 4, 4)
_tuned_deembed = tuned(_deembed_kernel, _TILES, _SPREAD_TILES, "BLOCK_N", 32)


# --- launcher ---------------------------------------------------------------------------------------------------------


def depth_parts(count: int, features: int, depth: int) -> int:
    """How many programs share one tile: enough for some 130 multiprocessors, with 256 terms each at least."""
    tiles, parts = -(-count // 64) * -(-features // 64), 1
    while tiles * parts < 128 and depth // (2 * parts) >= 256:
        parts *= 2
    return parts


def deembed_launch(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    grid: Sequence[int],
    residual: torch.Tensor | None,
    scale: float,
    scales: torch.Tensor | None,
    spread_over: int,
    packed: Sequence[int] | None,
    latent: torch.Tensor,
) -> Launch:
    """Arguments of ``_deembed_kernel``.

    Args:
        tokens: (B, N, d), any strides.
        weight: (s, s, C, d), the last axis contiguous; a permuted view serves rows of any order.
        bias: (s, s, C) or None, any strides.
        grid: tokens per axis, (h, w) or (f, h, w).
        residual: shape of ``latent``, any strides, or None.
        scale, scales: factor of the projection; a tensor (1,) or (B,), any stride, takes precedence over the
            number.
        packed: grid of the packed tokens of 2 x 2 pixels that ``latent`` holds, if it does.
        latent: contiguous, written: (B, C, H, W), (B, C, F, H, W) or packed (B, h*w, C*4).
    """
    _, _, _, height, width = latent_shape(latent, packed)
    rows, columns = grid[-2:]
    batch, per_sample, depth = tokens.shape
    count, features = batch * per_sample, math.prod(weight.shape[:3])
    weight, bias = _mergeable(weight, patch_size), None if bias is None else _mergeable(bias, patch_size)
    side = patch_size * spread_over
    parts = depth_parts(count, features, depth)
    padded = -(-count // 64) * -(-features // 64) * 64 * 64  # all tiles divide 64 x 64
    align, strides = aligned_strides(split_strides(latent, packed))
    residual_align, residual_strides = align, strides
    if residual is not None:
        residual_align, residual_strides = aligned_strides(split_strides(residual, packed))
    return Launch(
        _tuned_deembed,
        lambda meta: (-(-count // meta["BLOCK_M"]), -(-features // meta["BLOCK_N"]), parts),
        dict(
            tokens=tokens,
            weight=weight,
            bias=bias,
            residual=residual,
            latent=latent,
            partials=tokens.new_empty(parts * padded, dtype=torch.float32) if parts > 1 else None,
            tickets=zeroed(tokens.device, padded // MIN_TILE) if parts > 1 else None,
            token_strides=tokens.stride(),
            weight_strides=weight.stride()[1:3],
            bias_strides=(0, 0) if bias is None else bias.stride()[1:3],
            strides=strides,
            residual_strides=residual_strides,
            **scale_arguments(scale, scales),
            count=count,
            per_sample=per_sample,
            rows=rows,
            columns=columns,
            height=height,
            width=width,
            features=features,
            depth=depth,
            S=patch_size,
            PARTS=parts,
            REPEAT=spread_over,
            SPLIT=1 if packed is None else 2,
            ALIGN=align,
            RESIDUAL_ALIGN=residual_align,
            EXACT_ROWS=rows * side == height,
            EXACT_COLUMNS=columns * side == width,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            UPCAST=INTERPRETED,
        ),
    )


def _mergeable(rows: torch.Tensor, side: int) -> torch.Tensor:
    """``rows`` (s, s, C, ...) so that a pixel's number tells its place, and what follows the channel is contiguous."""
    merges = side == 1 or rows.stride(0) == side * rows.stride(1)
    return rows if merges and (rows.dim() == 3 or rows.stride(3) == 1) else rows.contiguous()


@library.custom_op("ddit::patch_deembed", mutates_args=())
def patch_deembed(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    grid: list[int],
    residual: torch.Tensor | None,
    scale: float,
    scales: torch.Tensor | None,
    spread_over: int,
    size: list[int],
    packed: bool,
) -> torch.Tensor:
    """The latent of ``size`` (H, W), or its packed tokens; other arguments as for :func:`deembed_launch`."""
    latent = _empty_latent(tokens, weight, patch_size, grid, residual, size, packed)
    if latent.numel():
        out_grid = [size[0] // 2, size[1] // 2] if packed else None
        deembed_launch(
            tokens, weight, bias, patch_size, grid, residual, scale, scales, spread_over, out_grid, latent
        ).run(latent.device)
    return latent


@patch_deembed.register_fake
def _(tokens, weight, bias, patch_size, grid, residual, scale, scales, spread_over, size, packed):  # type: ignore[no-untyped-def]
    return _empty_latent(tokens, weight, patch_size, grid, residual, size, packed)


def _empty_latent(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    patch_size: int,
    grid: Sequence[int],
    residual: torch.Tensor | None,
    size: Sequence[int],
    packed: bool,
) -> torch.Tensor:
    batch, channels, (height, width) = tokens.shape[0], weight.shape[2], size
    shape = (batch, channels, *grid[:-2], height, width)
    if packed:
        shape = (batch, (height // 2) * (width // 2), channels * 4)
    dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
    return tokens.new_empty(shape, dtype=dtype)


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
    batch, channels = tokens.shape[0], weight.shape[2]
    bias = None if bias is None else bias.to(weight.dtype).flatten()
    values = F.linear(tokens.to(weight.dtype), weight.flatten(0, 2), bias)
    values = scaled(values, scale).to(weight.dtype)
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
    return (latent if residual is None else latent + residual).contiguous()
