"""All of a coarse prediction that no model call makes, in one launch: high band, low band of the latent, residual.

With down the k x k mean, up its nearest-neighbour upsampling, z the latent at noise level σ and v' the model's
prediction on s·down(z) at σ' (:mod:`ddit_rt.granularity.bands`), band-split's velocity is

    v = up(a·v') + rest,    a = (1 - σ')/k + σ',    rest = up((1/k - 1)·s·down(z) + residual) + high,

since down(z) enters x_low and e_low alike. The de-embedding kernel takes a and rest, the embedding kernel s. All follow
from noise levels that are tensors, so that a captured graph can be replayed at another step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import library

from ddit_kernels._band_reference import means, per_sample, repeated, widened
from ddit_kernels._common import INTERPRETED, Launch, memory_span, tl, triton

BLOCK = 1024 if INTERPRETED else 128  # the interpreter runs one program after the other

# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _band_kernel(
    latent,
    anchor,  # latent of the last full step
    newest,  # prediction of the last full step
    older,  # of the one before
    residual,  # of the last full step, (B, C, F, rows, columns) as all residuals
    residual_older,
    level,
    level_newest,
    level_older,
    rest,
    factors,  # (3, B): s, a, σ'
    latent_strides,  # (batch, channel, frame, row, column) as all strides
    anchor_strides,
    newest_strides,
    older_strides,
    residual_strides,
    residual_older_strides,
    level_strides,  # of the three levels, 0 where one holds for all samples
    count,  # k x k blocks of all samples
    batch,
    channels,
    frames,
    rows,  # blocks
    columns,
    height,
    width,
    K: tl.constexpr,
    HIGH: tl.constexpr,  # 0: of the latent alone, 1: less that of the clean latent, 2: of the line, 3: none, a probe
    RESIDUALS: tl.constexpr,  # 0, 1, 2
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = block < count
    left = block % columns
    top = block // columns % rows
    plane = block // (rows * columns)
    frame = plane % frames
    channel = plane // frames % channels
    sample = plane // (frames * channels)

    sigma = tl.load(level + sample * level_strides[0], mask, 1.0)
    scale = 1.0 / ((1.0 - sigma) + sigma / K)
    of_mean = ((1.0 / K - 1.0) * scale).to(tl.float32)
    inverse = (1.0 / sigma).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    noise = tl.zeros((BLOCK,), tl.float32)
    if HIGH == 1:
        noise = tl.load(level_newest + sample * level_strides[1], mask, 1.0).to(tl.float32)
    if HIGH == 2 or RESIDUALS == 2:
        near = tl.load(level_newest + sample * level_strides[1], mask, 1.0)
        far = tl.load(level_older + sample * level_strides[2], mask, 2.0)
        share = tl.minimum((sigma - near) / (near - far), 1.0).to(tl.float32)

    # the edge repeats to the bottom and right, as replication padding would have it
    x = left[:, None] * K + tl.arange(0, K)[None, :]
    inside = tl.minimum(x, width - 1)
    wide = mask[:, None]
    where = sample * latent_strides[0] + channel * latent_strides[1] + frame * latent_strides[2]
    z = latent + where[:, None] + inside * latent_strides[4]
    if HIGH == 1:
        where = sample * anchor_strides[0] + channel * anchor_strides[1] + frame * anchor_strides[2]
        z_anchor = anchor + where[:, None] + inside * anchor_strides[4]
    if HIGH > 0:
        where = sample * newest_strides[0] + channel * newest_strides[1] + frame * newest_strides[2]
        v_newest = newest + where[:, None] + inside * newest_strides[4]
    if HIGH == 2:
        where = sample * older_strides[0] + channel * older_strides[1] + frame * older_strides[2]
        v_older = older + where[:, None] + inside * older_strides[4]

    mean = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    for row in range(K):
        y = tl.minimum(top * K + row, height - 1)[:, None]
        mean += tl.sum(tl.load(z + y * latent_strides[3], wide, 0.0).to(tl.float32), 1)
        if HIGH > 0:
            pixels = tl.load(v_newest + y * newest_strides[3], wide, 0.0).to(tl.float32)
            if HIGH == 1:
                clean = tl.load(z_anchor + y * anchor_strides[3], wide, 0.0).to(tl.float32)
                pixels = clean - noise[:, None] * pixels
            if HIGH == 2:
                before = tl.load(v_older + y * older_strides[3], wide, 0.0).to(tl.float32)
                pixels += share[:, None] * (pixels - before)
            low += tl.sum(pixels, 1)
    mean *= 1.0 / (K * K)
    low *= 1.0 / (K * K)

    flat = of_mean * mean
    if RESIDUALS > 0:
        where = sample * residual_strides[0] + channel * residual_strides[1] + frame * residual_strides[2]
        where += top * residual_strides[3] + left * residual_strides[4]
        last_residual = tl.load(residual + where, mask, 0.0).to(tl.float32)
        flat += last_residual
        if RESIDUALS == 2:
            where = sample * residual_older_strides[0] + channel * residual_older_strides[1]
            where += frame * residual_older_strides[2] + top * residual_older_strides[3]
            where += left * residual_older_strides[4]
            flat += share * (last_residual - tl.load(residual_older + where, mask, 0.0).to(tl.float32))
    if HIGH == 3:
        tl.store(rest + block, low - flat, mask)
    else:
        out = ((sample * channels + channel) * frames + frame).to(tl.int64)[:, None] * height * width + x
        for row in range(K):
            y = (top * K + row)[:, None]
            within = tl.minimum(y, height - 1)
            if HIGH == 2:
                high = tl.load(v_newest + within * newest_strides[3], wide, 0.0).to(tl.float32)
                before = tl.load(v_older + within * older_strides[3], wide, 0.0).to(tl.float32)
                high += share[:, None] * (high - before) - low[:, None]
            else:
                high = tl.load(z + within * latent_strides[3], wide, 0.0).to(tl.float32) - mean[:, None]
                if HIGH == 1:
                    clean = tl.load(z_anchor + within * anchor_strides[3], wide, 0.0).to(tl.float32)
                    clean -= noise[:, None] * tl.load(v_newest + within * newest_strides[3], wide, 0.0).to(tl.float32)
                    high -= clean - low[:, None]
                high *= inverse[:, None]
            tl.store(rest + out + y * width, flat[:, None] + high, wide & (y < height) & (x < width))

    one = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sigma = tl.load(level + one * level_strides[0], one < batch, 1.0)
    scale = 1.0 / ((1.0 - sigma) + sigma / K)
    low_sigma = scale * sigma / K
    gain = (1.0 - low_sigma) / K + low_sigma
    if HIGH == 3:
        gain = -gain
    tl.store(factors + one, scale.to(tl.float32), one < batch)
    tl.store(factors + batch + one, gain.to(tl.float32), one < batch)
    tl.store(factors + 2 * batch + one, low_sigma.to(tl.float32), one < batch)


# --- launcher ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BandMemory:
    """What a coarse step remembers; ``None`` where there is nothing. Latents and predictions are (B, C, F, H, W), any
    floating dtype and strides, residuals (B, C, F, H'/k, W'/k); levels have one element or B.

    Attributes:
        high: ``"latent"``, ``"clean"`` (needs ``anchor``, ``newest``), ``"line"`` (``newest``, ``older``), ``"probe"``
            (``newest``).
    """

    high: str = "latent"
    anchor: torch.Tensor | None = None
    newest: torch.Tensor | None = None
    older: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    residual_older: torch.Tensor | None = None
    level_newest: torch.Tensor | None = None
    level_older: torch.Tensor | None = None


HIGH = {"latent": 0, "clean": 1, "line": 2, "probe": 3}


def strides_of(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Of a (B, C, F, H, W) tensor that may be absent."""
    return (0, 0, 0, 0, 0) if tensor is None else tensor.stride()


def level_stride(level: torch.Tensor | None) -> int:
    """From sample to sample; 0 for a level that holds for all."""
    return 0 if level is None or level.numel() == 1 else level.stride(0)


def band_unsupported(multiple: int, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernel cannot take these arguments, ``None`` if it can."""
    if multiple & (multiple - 1):
        return f"the kernel takes k x k blocks whose side is a power of two, got {multiple}."
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the kernel takes float32, bfloat16 and float16, got {tensor.dtype}."
        if tensor is not None and memory_span(tensor.shape, tensor.stride()) >= 2**31:
            return f"a tensor of shape {tuple(tensor.shape)} spans more than 2^31 values in memory."
    return None


def band_launch(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    grid: tuple[int, int],
    memory: BandMemory,
    rest: torch.Tensor,
    factors: torch.Tensor,
) -> Launch:
    """Arguments of ``_band_kernel``.

    Args:
        latent: (B, C, F, H, W).
        level: σ, one element or B.
        multiple: k.
        grid: Rows and columns of k x k blocks, those that padding adds included.
        memory: What the step remembers.
        rest: float32, written: (B, C, F, H, W), or (B, C, F, rows, columns) for a probe; contiguous.
        factors: float32 (3, B), written.
    """
    batch, channels, frames, height, width = latent.shape
    rows, columns = grid
    count = batch * channels * frames * rows * columns
    residuals = sum(one is not None for one in (memory.residual, memory.residual_older))
    levels = (level, memory.level_newest, memory.level_older)

    return Launch(
        _band_kernel,
        (-(-count // BLOCK),),
        dict(
            latent=latent,
            anchor=memory.anchor,
            newest=memory.newest,
            older=memory.older,
            residual=memory.residual,
            residual_older=memory.residual_older,
            level=level,
            level_newest=memory.level_newest,
            level_older=memory.level_older,
            rest=rest,
            factors=factors,
            latent_strides=latent.stride(),
            anchor_strides=strides_of(memory.anchor),
            newest_strides=strides_of(memory.newest),
            older_strides=strides_of(memory.older),
            residual_strides=strides_of(memory.residual),
            residual_older_strides=strides_of(memory.residual_older),
            level_strides=tuple(map(level_stride, levels)),
            count=count,
            batch=batch,
            channels=channels,
            frames=frames,
            rows=rows,
            columns=columns,
            height=height,
            width=width,
            K=multiple,
            HIGH=HIGH[memory.high],
            RESIDUALS=residuals,
            BLOCK=BLOCK,
        ),
    )


@library.custom_op("ddit::band_rest", mutates_args=())
def band_rest(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    grid: list[int],
    high: str,
    anchor: torch.Tensor | None,
    newest: torch.Tensor | None,
    older: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_older: torch.Tensor | None,
    level_newest: torch.Tensor | None,
    level_older: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rest, factors); arguments as for :func:`band_launch` and :class:`BandMemory`."""
    rest, factors = _empty_rest(latent, grid, high)
    if rest.numel():
        memory = BandMemory(high, anchor, newest, older, residual, residual_older, level_newest, level_older)
        band_launch(latent, level, multiple, (grid[0], grid[1]), memory, rest, factors).run(latent.device)
    return rest, factors


@band_rest.register_fake
def _(latent, level, multiple, grid, high, *memory):  # type: ignore[no-untyped-def]
    return _empty_rest(latent, grid, high)


def _empty_rest(latent: torch.Tensor, grid: Any, high: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*latent.shape[:3], *grid) if high == "probe" else latent.shape
    return latent.new_empty(shape, dtype=torch.float32), latent.new_empty(3, latent.shape[0], dtype=torch.float32)


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def band_rest_reference(
    latent: torch.Tensor, level: torch.Tensor, multiple: int, grid: tuple[int, int], memory: BandMemory
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch version of the kernel. See :func:`ddit_rt.ops.band_rest`."""
    bottom, right = grid[0] * multiple - latent.shape[3], grid[1] * multiple - latent.shape[4]
    wide = partial(widened, bottom=bottom, right=right)
    down, up = partial(means, multiple=multiple), partial(repeated, multiple=multiple)

    def line(newest: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
        near, far = per_sample(memory.level_newest), per_sample(memory.level_older)
        return newest + ((sigma - near) / (near - far)).clamp(max=1.0).float() * (newest - older)

    sigma = per_sample(level)
    scale = 1 / ((1 - sigma) + sigma / multiple)
    low_sigma = scale * sigma / multiple
    gain = (1 - low_sigma) / multiple + low_sigma
    padded = wide(latent)
    flat = ((1 / multiple - 1) * scale).float() * down(padded)
    if memory.residual is not None:
        last = memory.residual.float()
        flat = flat + (last if memory.residual_older is None else line(last, memory.residual_older.float()))
    newest = None if memory.newest is None else wide(memory.newest)
    if memory.high == "probe":
        assert newest is not None
        rest, gain = down(newest) - flat, -gain
    else:
        if memory.high == "line":
            assert newest is not None and memory.older is not None
            high = line(newest, wide(memory.older))
        elif memory.high == "clean":
            assert newest is not None and memory.anchor is not None
            high = (padded - wide(memory.anchor) + per_sample(memory.level_newest).float() * newest) / sigma.float()
        else:
            high = padded / sigma.float()
        rest = up(flat - down(high)) + high
        rest = rest[..., : latent.shape[3], : latent.shape[4]].contiguous()
    factors = [one.float().flatten().expand(latent.shape[0]) for one in (scale, gain, low_sigma)]
    return rest, torch.stack(factors)
