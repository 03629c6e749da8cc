"""Patchify and embed in one launch: gather s x s patches of a latent, multiply by the embedding.

A matrix product whose left operand is read from the latent where it lies: the patches never exist in memory. The k x k
mean and the scale of a coarse band-split step happen while they are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import library

from ddit_kernels._common import INTERPRETED, Launch, latent_shape, split_strides, tl, triton, unpack_latent
from ddit_kernels._gemm import aligned_strides, column_of, line_of, scale_arguments, scaled, tuned

# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _embed_kernel(
    latent,
    weight,
    bias,
    size_embedding,
    extra,
    scales,
    tokens,
    strides,  # of the latent: (batch, channel, frame, row block, row) over ALIGN, then (column block, column)
    extra_strides,  # (batch, token, feature), 0 where it broadcasts
    weight_stride,  # between features
    scale_stride,
    factor,
    count,  # tokens of all samples
    per_sample,
    rows,
    columns,
    height,
    width,
    features,
    depth,  # C * S * S
    S: tl.constexpr,
    REPEAT: tl.constexpr,  # k: a value is the mean of k x k pixels
    SPLIT: tl.constexpr,  # 2: a packed token holds 2 x 2 pixels; 1: plain strides
    ALIGN: tl.constexpr,
    EXACT_ROWS: tl.constexpr,  # patches never leave the latent at the bottom
    EXACT_COLUMNS: tl.constexpr,  # nor at the right
    SCALE: tl.constexpr,  # 0: none, 1: factor, 2: scales
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    EXTRA: tl.constexpr,
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
    top = place // columns % rows * (S * REPEAT)
    left = place % columns * (S * REPEAT)
    base = sample * strides[0] + place // (rows * columns) * strides[2]

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, depth, BLOCK_K):
        # x is innermost in the depth, so that neighbouring values are neighbours in memory
        index = first + tl.arange(0, BLOCK_K)
        channel = index // (S * S)
        mask = token_mask[:, None] & (index < depth)[None, :]
        if REPEAT == 1:
            y = top[:, None] + (index // S % S)[None, :]
            x = left[:, None] + (index % S)[None, :]
            # The edge repeats to the bottom and right, as replication padding would have it.
            if not EXACT_ROWS:
                y = tl.minimum(y, height - 1)
            if not EXACT_COLUMNS:
                x = tl.minimum(x, width - 1)
            where = line_of(strides, base[:, None], channel[None, :], y, SPLIT, ALIGN) + column_of(strides, x, SPLIT)
            patches = tl.load(latent + where, mask, 0.0).to(tl.float32)
        else:
            patches = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            x = left[:, None, None] + ((index % S) * REPEAT)[None, :, None] + tl.arange(0, REPEAT)[None, None, :]
            if not EXACT_COLUMNS:
                x = tl.minimum(x, width - 1)
            for row in range(REPEAT):
                y = top[:, None] + (index // S % S * REPEAT + row)[None, :]
                if not EXACT_ROWS:
                    y = tl.minimum(y, height - 1)
                line = line_of(strides, base[:, None], channel[None, :], y, SPLIT, ALIGN)
                where = line[:, :, None] + column_of(strides, x, SPLIT)
                patches += tl.sum(tl.load(latent + where, mask[:, :, None], 0.0).to(tl.float32), 2)
            patches *= 1.0 / (REPEAT * REPEAT)
        if SCALE == 1:
            patches *= factor
        if SCALE == 2:
            patches *= tl.load(scales + sample * scale_stride, token_mask, 0.0).to(tl.float32)[:, None]
        weight_mask = feature_mask[:, None] & (index < depth)[None, :]
        columns_of_weight = tl.load(weight + feature[:, None] * weight_stride + index[None, :], weight_mask, 0.0)
        patches = patches.to(weight.dtype.element_ty)
        if UPCAST:
            patches = patches.to(tl.float32)
            columns_of_weight = columns_of_weight.to(tl.float32)
        product = tl.dot(patches, tl.trans(columns_of_weight), product, input_precision="tf32x3")

    if BIAS:
        product += tl.load(bias + feature, feature_mask, 0.0).to(tl.float32)[None, :]
    if SIZE:
        product += tl.load(size_embedding + feature, feature_mask, 0.0).to(tl.float32)[None, :]
    mask = token_mask[:, None] & feature_mask[None, :]
    if EXTRA:
        offset = sample.to(tl.int64) * extra_strides[0] + place.to(tl.int64) * extra_strides[1]
        offset = offset[:, None] + (feature * extra_strides[2])[None, :]
        product += tl.load(extra + offset, mask, 0.0).to(tl.float32)
    where = token.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(tokens + where, product.to(tokens.dtype.element_ty), mask)


_TILES = (128, 128, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3), (32, 64, 64, 4, 4)
_MEAN_TILES = (64, 128, 32, 8, 3), (32, 64, 32, 4, 3), (64, 128, 16, 8, 3), (32, 64, 16, 4, 4)
_tuned_embed = tuned(_embed_kernel, _TILES, _MEAN_TILES, "BLOCK_K", 16)


# --- launcher ---------------------------------------------------------------------------------------------------------


def embed_launch(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    extra: torch.Tensor | None,
    size_embedding: torch.Tensor | None,
    mean_over: int,
    scale: float,
    scales: torch.Tensor | None,
    packed: Sequence[int] | None,
    tokens: torch.Tensor,
) -> Launch:
    """Arguments of ``_embed_kernel``.

    Args:
        latent: (B, C, H, W), (B, C, F, H, W) or packed (B, h*w, C*4), any strides.
        weight: (d, C, s, s) or (d, C, 1, s, s), columns in the order (channel, row, column); may be some channels of a
            wider one, without a copy.
        bias, size_embedding: (d,) or None, any strides.
        extra: broadcastable to (B, N, d) or None.
        scale, scales: factor of the latent; a tensor (1,) or (B,), any stride, takes precedence over the number.
        packed: token grid (h, w) of a packed latent.
        tokens: (B, N, d) contiguous, written.
    """
    batch, channels, frames, height, width = latent_shape(latent, packed)
    strides, split = split_strides(latent, packed), 1 if packed is None else 2
    features, depth = weight.shape[0], channels * patch_size**2
    if packed is not None and patch_size == 2 and mean_over == 1:
        # A packed token is the patch, in the order of the weight: read it as one pixel of many channels, in one piece.
        (height, width), patch_size, split = packed, 1, 1
        strides = latent.stride(0), latent.stride(2), 0, strides[3], 0, strides[5], 0
    side = patch_size * mean_over
    rows, columns = -(-height // side), -(-width // side)
    count = batch * frames * rows * columns
    align, strides = aligned_strides(strides)
    weight = weight.flatten(1)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    return Launch(
        _tuned_embed,
        lambda meta: (-(-count // meta["BLOCK_M"]), -(-features // meta["BLOCK_N"])),
        dict(
            latent=latent,
            weight=weight,
            bias=None if bias is None else bias.contiguous(),
            size_embedding=None if size_embedding is None else size_embedding.contiguous(),
            extra=extra,
            tokens=tokens,
            strides=strides,
            extra_strides=(0, 0, 0) if extra is None else extra.expand(tokens.shape).stride(),
            weight_stride=weight.stride(0),
            **scale_arguments(scale, scales),
            count=count,
            per_sample=frames * rows * columns,
            rows=rows,
            columns=columns,
            height=height,
            width=width,
            features=features,
            depth=depth,
            S=patch_size,
            REPEAT=mean_over,
            SPLIT=split,
            ALIGN=align,
            EXACT_ROWS=height % side == 0,
            EXACT_COLUMNS=width % side == 0,
            BIAS=bias is not None,
            SIZE=size_embedding is not None,
            EXTRA=extra is not None,
            UPCAST=INTERPRETED,
        ),
    )


@library.custom_op("ddit::patch_embed", mutates_args=())
def patch_embed(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    extra: torch.Tensor | None,
    size_embedding: torch.Tensor | None,
    mean_over: int,
    scale: float,
    scales: torch.Tensor | None,
    packed: list[int] | None,
) -> torch.Tensor:
    """Tokens (B, N, d) in the weight's dtype; arguments as for :func:`embed_launch`."""
    tokens = _empty_tokens(latent, weight, patch_size * mean_over, packed)
    if tokens.numel():
        launch = embed_launch(
            latent, weight, bias, patch_size, extra, size_embedding, mean_over, scale, scales, packed, tokens
        )
        launch.run(tokens.device)
    return tokens


@patch_embed.register_fake
def _(latent, weight, bias, patch_size, extra, size_embedding, mean_over, scale, scales, packed):  # type: ignore[no-untyped-def]
    return _empty_tokens(latent, weight, patch_size * mean_over, packed)


def _empty_tokens(latent: torch.Tensor, weight: torch.Tensor, side: int, packed: Sequence[int] | None) -> torch.Tensor:
    batch, _, frames, height, width = latent_shape(latent, packed)
    return latent.new_empty(batch, frames * -(-height // side) * -(-width // side), weight.shape[0], dtype=weight.dtype)


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
    patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames * rows * columns, channels * patch_size**2)
    tokens = F.linear(patches.to(weight.dtype), weight.flatten(1), None if bias is None else bias.to(weight.dtype))
    if size_embedding is not None:
        tokens = tokens + size_embedding.to(tokens.dtype)
    return tokens if extra is None else tokens + extra.to(tokens.dtype)
