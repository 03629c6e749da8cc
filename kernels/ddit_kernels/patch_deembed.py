"""Project tokens and put their s x s patches back into the latent in one launch, with scale and residual.

A matrix product that stores its result where the latent wants it. The rows of the weight are read in the order in which
the latent lies in memory, (channel, row, column), so that no result has to be shuffled afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import library

from ddit_kernels._common import INTERPRETED, Launch, latent_shape, pack_latent, split_strides, tl, triton
from ddit_kernels._gemm import scale_arguments, scaled, tuned
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
    strides,  # of the latent: (batch, channel, frame, row block, row, column block, column)
    residual_strides,  # same order
    scale_stride,
    factor,
    count,  # tokens of all samples
    per_sample,
    rows,
    columns,
    height,
    width,
    channels,
    features,  # C * S * S
    depth,
    S: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the depth of one tile
    SPREAD: tl.constexpr,
    SPLIT: tl.constexpr,  # 2: a packed token holds 2 x 2 pixels; 1: plain strides
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
    channel = feature // (S * S)
    line = feature % (S * S) * channels + channel  # the weight's rows are ordered (row, column, channel)

    base = sample.to(tl.int64) * token_strides[0] + place.to(tl.int64) * token_strides[1]
    part = tl.cdiv(tl.cdiv(depth, PARTS), BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, depth)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        inside = (index < end)[None, :]
        left = tl.load(tokens + base[:, None] + (index * token_strides[2])[None, :], token_mask[:, None] & inside, 0.0)
        right = tl.load(weight + line[:, None] * depth + index[None, :], feature_mask[:, None] & inside, 0.0)
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
        product += tl.load(bias + line, feature_mask, 0.0).to(tl.float32)[None, :]
    if SCALE == 1:
        product *= factor
    if SCALE == 2:
        product *= tl.load(scales + sample * scale_stride, token_mask, 0.0).to(tl.float32)[:, None]

    frame = place // (rows * columns)
    top = place // columns % rows * (S * SPREAD)
    left_edge = place % columns * (S * SPREAD)
    start = sample * strides[0] + frame * strides[2]
    residual_start = sample * residual_strides[0] + frame * residual_strides[2]
    for pixel in range(SPREAD * SPREAD):
        y = top[:, None] + (feature // S % S * SPREAD + pixel // SPREAD)[None, :]
        x = left_edge[:, None] + (feature % S * SPREAD + pixel % SPREAD)[None, :]
        mask = token_mask[:, None] & feature_mask[None, :] & (y < height) & (x < width)
        where = start[:, None] + (channel * strides[1])[None, :]
        where += y // SPLIT * strides[3] + x // SPLIT * strides[5]
        if SPLIT > 1:
            where += y % SPLIT * strides[4] + x % SPLIT * strides[6]
        result = product
        if RESIDUAL:
            other = residual_start[:, None] + (channel * residual_strides[1])[None, :]
            other += y // SPLIT * residual_strides[3] + x // SPLIT * residual_strides[5]
            if SPLIT > 1:
                other += y % SPLIT * residual_strides[4] + x % SPLIT * residual_strides[6]
            result += tl.load(residual + other, mask, 0.0).to(tl.float32)
        tl.store(latent + where, result.to(latent.dtype.element_ty), mask)


_tuned_deembed = tuned(_deembed_kernel, (64, 64, 64, 8, 4), (32, 64, 64, 4, 3), (32, 32, 128, 4, 4))


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
        weight: (s*s*C, d), rows in the order (row, column, channel).
        bias: (s*s*C,) or None.
        grid: tokens per axis, (h, w) or (f, h, w).
        residual: shape of ``latent``, any strides, or None.
        scale, scales: factor of the projection; a tensor (1,) or (B,) takes precedence over the number.
        packed: grid of the packed tokens of 2 x 2 pixels that ``latent`` holds, if it does.
        latent: contiguous, written: (B, C, H, W), (B, C, F, H, W) or packed (B, h*w, C*4).
    """
    _, channels, _, height, width = latent_shape(latent, packed)
    rows, columns = grid[-2:]
    batch, per_sample, depth = tokens.shape
    count, features = batch * per_sample, weight.shape[0]
    parts = depth_parts(count, features, depth)
    padded = -(-count // 64) * -(-features // 64) * 64 * 64  # all tiles divide 64 x 64
    strides = split_strides(latent, packed)
    return Launch(
        _tuned_deembed,
        lambda meta: (-(-count // meta["BLOCK_M"]), -(-features // meta["BLOCK_N"]), parts),
        dict(
            tokens=tokens,
            weight=weight.contiguous(),
            bias=bias,
            residual=residual,
            latent=latent,
            partials=tokens.new_empty(parts * padded, dtype=torch.float32) if parts > 1 else None,
            tickets=zeroed(tokens.device, padded // MIN_TILE) if parts > 1 else None,
            token_strides=tokens.stride(),
            strides=strides,
            residual_strides=strides if residual is None else split_strides(residual, packed),
            **scale_arguments(scale, scales),
            count=count,
            per_sample=per_sample,
            rows=rows,
            columns=columns,
            height=height,
            width=width,
            channels=channels,
            features=features,
            depth=depth,
            S=patch_size,
            PARTS=parts,
            SPREAD=spread_over,
            SPLIT=1 if packed is None else 2,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            UPCAST=INTERPRETED,
        ),
    )


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
    batch, channels, (height, width) = tokens.shape[0], weight.shape[0] // patch_size**2, size
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
    batch, channels = tokens.shape[0], weight.shape[0] // patch_size**2
    values = F.linear(tokens.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
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
