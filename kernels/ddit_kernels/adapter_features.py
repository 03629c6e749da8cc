"""What an adapter reads, in one launch: the scaled latent, its noise level, and what the run remembers, as channels.

See :mod:`ddit_rt.granularity.paths.adapter`. Latent and predictions are extended to the grid by repeating the edge, and
all is written in the model's dtype, so that embedding and residual block read it as it is. The numbers that the step's
end needs follow from the same noise levels and are written beside it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import library

from ddit_kernels._band_reference import per_sample, widened
from ddit_kernels._common import Launch, tl, triton
from ddit_kernels.band_rest import BandMemory, level_stride, strides_of

BLOCK = 512
LEAST = 1e-4
"""Added to the line's root mean square, which is divided by."""

# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _features_kernel(
    latent,
    newest,
    older,
    level,
    level_newest,
    level_older,
    apart,  # (B,) root mean square of newest less older
    features,  # (B, C + 1 or 3 C + 3, F, rows, columns)
    factors,  # (4, B): s, a, σ', the line's scale
    latent_strides,  # (batch, channel, frame, row, column) as all strides
    newest_strides,
    older_strides,
    level_strides,  # of the three levels, 0 where one holds for all samples
    count,  # pixels of all samples, padding included, channels not
    batch,
    frames,
    rows,
    columns,
    height,
    width,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    KNOWN: tl.constexpr,  # full steps remembered: 0, 1, 2
    MEMORY: tl.constexpr,  # the adapter reads them
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < count
    area = frames * rows * columns
    sample = pixel // area
    frame = pixel // (rows * columns) % frames
    y = tl.minimum(pixel // columns % rows, height - 1)
    x = tl.minimum(pixel % columns, width - 1)

    sigma = tl.load(level + sample * level_strides[0], mask, 1.0)
    scale = (1.0 / ((1.0 - sigma) + sigma / K)).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    distance = tl.zeros((BLOCK,), tl.float32)
    if KNOWN > 0:
        near = tl.load(level_newest + sample * level_strides[1], mask, 1.0)
        distance = (near - sigma).to(tl.float32)
    if MEMORY and KNOWN > 1:
        far = tl.load(level_older + sample * level_strides[2], mask, 2.0)
        share = tl.minimum((sigma - near) / (near - far), 1.0).to(tl.float32)
        share /= tl.abs(share) * tl.load(apart + sample, mask, 1.0) + LEAST

    extra: tl.constexpr = 2 * CHANNELS + 2 if MEMORY else 0
    out = features + sample * (CHANNELS + 1 + extra) * area + pixel % area
    here = sample * latent_strides[0] + frame * latent_strides[2] + y * latent_strides[3] + x * latent_strides[4]
    at_newest = sample * newest_strides[0] + frame * newest_strides[2] + y * newest_strides[3] + x * newest_strides[4]
    at_older = sample * older_strides[0] + frame * older_strides[2] + y * older_strides[3] + x * older_strides[4]
    for channel in range(CHANNELS):
        value = tl.load(latent + here + channel * latent_strides[1], mask, 0.0).to(tl.float32)
        tl.store(out + channel * area, (scale * value).to(features.dtype.element_ty), mask)
        if MEMORY:
            last = tl.zeros((BLOCK,), tl.float32)
            slope = tl.zeros((BLOCK,), tl.float32)
            if KNOWN > 0:
                last = tl.load(newest + at_newest + channel * newest_strides[1], mask, 0.0).to(tl.float32)
            if KNOWN > 1:
                before = tl.load(older + at_older + channel * older_strides[1], mask, 0.0).to(tl.float32)
                slope = share * (last - before)
            tl.store(out + (CHANNELS + 1 + channel) * area, last.to(features.dtype.element_ty), mask)
            tl.store(out + (2 * CHANNELS + 1 + channel) * area, slope.to(features.dtype.element_ty), mask)
    tl.store(out + CHANNELS * area, sigma.to(tl.float32).to(features.dtype.element_ty), mask)
    if MEMORY:
        present = tl.full((BLOCK,), 1.0 if KNOWN > 0 else 0.0, tl.float32)
        tl.store(out + (3 * CHANNELS + 1) * area, distance.to(features.dtype.element_ty), mask)
        tl.store(out + (3 * CHANNELS + 2) * area, present.to(features.dtype.element_ty), mask)

    one = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sigma = tl.load(level + one * level_strides[0], one < batch, 1.0)
    scale_of_all = 1.0 / ((1.0 - sigma) + sigma / K)
    low_sigma = scale_of_all * sigma / K
    unit = tl.full((BLOCK,), 1.0, tl.float32)
    if MEMORY and KNOWN > 0:
        near = tl.load(level_newest + one * level_strides[1], one < batch, 1.0)
        unit = (near - sigma).to(tl.float32)
        if KNOWN > 1:
            far = tl.load(level_older + one * level_strides[2], one < batch, 2.0)
            way = tl.minimum((sigma - near) / (near - far), 1.0).to(tl.float32)
            unit = tl.abs(way) * tl.load(apart + one, one < batch, 1.0) + LEAST
    tl.store(factors + one, scale_of_all.to(tl.float32), one < batch)
    tl.store(factors + batch + one, ((1.0 - low_sigma) / K + low_sigma).to(tl.float32), one < batch)
    tl.store(factors + 2 * batch + one, low_sigma.to(tl.float32), one < batch)
    tl.store(factors + 3 * batch + one, unit, one < batch)


# --- launcher ---------------------------------------------------------------------------------------------------------


def features_launch(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    memory: BandMemory,
    apart: torch.Tensor | None,
    reads_memory: bool,
    features: torch.Tensor,
    factors: torch.Tensor,
) -> Launch:
    """Arguments of ``_features_kernel``.

    Args:
        latent: (B, C, F, H, W), any strides.
        level: σ, one element or B.
        multiple: k.
        memory: The last full steps: ``newest`` and ``older`` (B, C, F, H, W), and their levels.
        apart: (B,) float32, with two of them.
        reads_memory: Whether the adapter does.
        features: (B, C', F, rows, columns) contiguous, written.
        factors: float32 (4, B), written.
    """
    batch, channels, frames, height, width = latent.shape
    rows, columns = features.shape[3:]
    count = batch * frames * rows * columns
    levels = (level, memory.level_newest, memory.level_older)
    return Launch(
        _features_kernel,
        (-(-count // BLOCK),),
        dict(
            latent=latent,
            newest=memory.newest,
            older=memory.older,
            level=level,
            level_newest=memory.level_newest,
            level_older=memory.level_older,
            apart=apart,
            features=features,
            factors=factors,
            latent_strides=latent.stride(),
            newest_strides=strides_of(memory.newest),
            older_strides=strides_of(memory.older),
            level_strides=tuple(map(level_stride, levels)),
            count=count,
            batch=batch,
            frames=frames,
            rows=rows,
            columns=columns,
            height=height,
            width=width,
            CHANNELS=channels,
            K=multiple,
            KNOWN=sum(one is not None for one in (memory.newest, memory.older)),
            MEMORY=reads_memory,
            LEAST=LEAST,
            BLOCK=BLOCK,
        ),
    )


@library.custom_op("ddit::adapter_features", mutates_args=())
def adapter_features(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    grid: list[int],
    reads_memory: bool,
    newest: torch.Tensor | None,
    older: torch.Tensor | None,
    level_newest: torch.Tensor | None,
    level_older: torch.Tensor | None,
    apart: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, factors); arguments as for :func:`features_launch`, ``grid`` in pixels."""
    features, factors = _empty_features(latent, grid, reads_memory)
    if features.numel():
        memory = BandMemory(newest=newest, older=older, level_newest=level_newest, level_older=level_older)
        features_launch(latent, level, multiple, memory, apart, reads_memory, features, factors).run(latent.device)
    return features, factors


@adapter_features.register_fake
def _(latent, level, multiple, grid, reads_memory, *known):  # type: ignore[no-untyped-def]
    return _empty_features(latent, grid, reads_memory)


def _empty_features(latent: torch.Tensor, grid: Any, reads_memory: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, frames = latent.shape[:3]
    extra = 1 + (2 * channels + 2 if reads_memory else 0)
    features = latent.new_empty(batch, channels + extra, frames, *grid)
    return features, latent.new_empty(4, batch, dtype=torch.float32)


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def adapter_features_reference(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    grid: tuple[int, int],
    reads_memory: bool,
    memory: BandMemory,
    apart: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch version of the kernel. See :func:`ddit_rt.ops.adapter_features`."""
    batch, bottom, right = len(latent), grid[0] - latent.shape[3], grid[1] - latent.shape[4]

    wide = partial(widened, bottom=bottom, right=right)
    sigma = per_sample(level)
    scale = 1 / ((1 - sigma) + sigma / multiple)
    low_sigma = scale * sigma / multiple
    padded = wide(latent)
    plane = torch.zeros_like(padded[:, :1])
    parts = [scale.float() * padded, plane + sigma.float()]
    unit = torch.ones_like(sigma)
    if reads_memory:
        last = slope = torch.zeros_like(padded)
        distance = torch.zeros_like(sigma)
        if memory.newest is not None:
            assert memory.level_newest is not None
            last = wide(memory.newest)
            near = per_sample(memory.level_newest)
            unit = distance = near - sigma
            if memory.older is not None:
                assert memory.level_older is not None and apart is not None
                share = ((sigma - near) / (near - per_sample(memory.level_older))).clamp(max=1.0)
                unit = share.abs() * per_sample(apart) + LEAST
                slope = (share / unit).float() * (last - wide(memory.older))
        present = plane + (memory.newest is not None)
        parts += [last, slope, plane + distance.float(), present]
    factors = (scale, (1 - low_sigma) / multiple + low_sigma, low_sigma, unit)
    stacked = torch.stack([one.float().flatten().expand(batch) for one in factors])
    return torch.cat(parts, dim=1).to(latent.dtype), stacked
