"""The velocity of an adapter's coarse step, in one launch, from what its de-embedding and residual block gave.

With o and c the two predictions of the de-embedding, b band-split of down(o), f the line's end and g the trust in it,

    v = b + g·(f - b) + unit·(c + residual)

(:mod:`ddit_rt.granularity.paths.adapter`). The factors are those of :mod:`ddit_kernels.adapter_features`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import library

from ddit_kernels._band_reference import means, per_sample, repeated, widened
from ddit_kernels._common import INTERPRETED, Launch, tl, triton
from ddit_kernels.band_rest import BandMemory, level_stride, strides_of

BLOCK = 1024 if INTERPRETED else 128  # the interpreter runs one program after the other

# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _velocity_kernel(
    latent,
    decoded,  # (B, 2 C, F, rows · K, columns · K)
    residual,  # (B, tokens, C · SIDE · SIDE), values ordered (channel, row, column)
    trust,  # (C,)
    anchor,
    newest,
    older,
    level,
    level_newest,
    level_older,
    factors,  # (4, B)
    velocity,  # (B, C, F, H, W)
    latent_strides,  # (batch, channel, frame, row, column) as all strides
    decoded_strides,
    anchor_strides,
    newest_strides,
    older_strides,
    level_strides,
    count,  # k x k blocks of all samples
    batch,
    channels,
    frames,
    rows,  # blocks
    columns,
    height,
    width,
    trust_speed,
    K: tl.constexpr,
    SIDE: tl.constexpr,  # of a coarse patch, in latent pixels
    KNOWN: tl.constexpr,  # full steps remembered: 0, 1, 2
    MEMORY: tl.constexpr,  # the adapter reads them
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
    inverse = (1.0 / sigma).to(tl.float32)
    scale = tl.load(factors + sample, mask, 1.0)
    gain = tl.load(factors + batch + sample, mask, 1.0)
    unit = tl.load(factors + 3 * batch + sample, mask, 1.0)
    noise = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    trusted = tl.zeros((BLOCK,), tl.float32)
    if KNOWN > 0:
        near = tl.load(level_newest + sample * level_strides[1], mask, 1.0)
        noise = near.to(tl.float32)
        if MEMORY:
            trusted = trust_speed * tl.load(trust + channel, mask, 0.0).to(tl.float32)
    if KNOWN > 1:
        far = tl.load(level_older + sample * level_strides[2], mask, 2.0)
        share = tl.minimum((sigma - near) / (near - far), 1.0).to(tl.float32)

    x = left[:, None] * K + tl.arange(0, K)[None, :]
    inside = tl.minimum(x, width - 1)
    wide = mask[:, None]
    where = sample * latent_strides[0] + channel * latent_strides[1] + frame * latent_strides[2]
    z = latent + where[:, None] + inside * latent_strides[4]
    where = sample * decoded_strides[0] + channel * decoded_strides[1] + frame * decoded_strides[2]
    decoded_out = decoded + where[:, None] + x * decoded_strides[4]
    if KNOWN > 0:
        where = sample * anchor_strides[0] + channel * anchor_strides[1] + frame * anchor_strides[2]
        z_anchor = anchor + where[:, None] + inside * anchor_strides[4]
        where = sample * newest_strides[0] + channel * newest_strides[1] + frame * newest_strides[2]
        v_newest = newest + where[:, None] + inside * newest_strides[4]
    if KNOWN > 1:
        where = sample * older_strides[0] + channel * older_strides[1] + frame * older_strides[2]
        v_older = older + where[:, None] + inside * older_strides[4]

    mean = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK,), tl.float32)
    clean_mean = tl.zeros((BLOCK,), tl.float32)
    for row in range(K):
        y = (top * K + row)[:, None]
        within = tl.minimum(y, height - 1)
        mean += tl.sum(tl.load(z + within * latent_strides[3], wide, 0.0).to(tl.float32), 1)
        out += tl.sum(tl.load(decoded_out + y * decoded_strides[3], wide, 0.0).to(tl.float32), 1)
        if KNOWN > 0:
            clean = tl.load(z_anchor + within * anchor_strides[3], wide, 0.0).to(tl.float32)
            clean -= noise[:, None] * tl.load(v_newest + within * newest_strides[3], wide, 0.0).to(tl.float32)
            clean_mean += tl.sum(clean, 1)
    mean *= 1.0 / (K * K)
    out *= 1.0 / (K * K)
    clean_mean *= 1.0 / (K * K)
    flat = gain * out + (1.0 / K - 1.0) * scale * mean

    per_side: tl.constexpr = SIDE // K
    token = (frame * (rows // per_side) + top // per_side) * (columns // per_side) + left // per_side
    tokens = frames * (rows // per_side) * (columns // per_side)
    values = (((sample * tokens + token) * channels + channel) * (SIDE * SIDE))[:, None] + x % SIDE
    start = ((sample * channels + channel) * frames + frame).to(tl.int64)[:, None] * height * width + x
    correction = decoded_out + channels * decoded_strides[1]
    for row in range(K):
        y = (top * K + row)[:, None]
        within = tl.minimum(y, height - 1)
        high = tl.load(z + within * latent_strides[3], wide, 0.0).to(tl.float32) - mean[:, None]
        if KNOWN > 0:
            last = tl.load(v_newest + within * newest_strides[3], wide, 0.0).to(tl.float32)
            clean = tl.load(z_anchor + within * anchor_strides[3], wide, 0.0).to(tl.float32) - noise[:, None] * last
            high -= clean - clean_mean[:, None]
        result = flat[:, None] + high * inverse[:, None]
        if MEMORY and KNOWN > 0:
            forecast = last
            if KNOWN > 1:
                before = tl.load(v_older + within * older_strides[3], wide, 0.0).to(tl.float32)
                forecast = last + share[:, None] * (last - before)
            result += trusted[:, None] * (forecast - result)
        past = tl.load(residual + values + y % SIDE * SIDE, wide, 0.0).to(tl.float32)
        past += tl.load(correction + y * decoded_strides[3], wide, 0.0).to(tl.float32)
        result += unit[:, None] * past
        tl.store(velocity + start + y * width, result, wide & (y < height) & (x < width))


# --- launcher ---------------------------------------------------------------------------------------------------------


def velocity_launch(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    side: int,
    decoded: torch.Tensor,
    residual: torch.Tensor,
    trust: torch.Tensor | None,
    trust_speed: float,
    memory: BandMemory,
    factors: torch.Tensor,
    velocity: torch.Tensor,
) -> Launch:
    """Arguments of ``_velocity_kernel``.

    Args:
        latent: (B, C, F, H, W), any strides.
        level: σ, one element or B.
        multiple, side: k, and k·p.
        decoded: (B, 2·C, F, H', W'), the latent's size extended to the grid.
        residual: (B, N, C·side·side), contiguous.
        trust, trust_speed: (C,) with memory, any stride, and what it is multiplied with.
        memory: The last full steps: ``anchor``, ``newest``, ``older`` and their levels.
        factors: float32 (4, B).
        velocity: float32 (B, C, F, H, W), contiguous, written.
    """
    batch, channels, frames, height, width = latent.shape
    rows, columns = (size // multiple for size in decoded.shape[3:])
    count = batch * channels * frames * rows * columns
    levels = (level, memory.level_newest, memory.level_older)
    return Launch(
        _velocity_kernel,
        (-(-count // BLOCK),),
        dict(
            latent=latent,
            decoded=decoded,
            residual=residual,
            trust=None if trust is None else trust.contiguous(),
            anchor=memory.anchor,
            newest=memory.newest,
            older=memory.older,
            level=level,
            level_newest=memory.level_newest,
            level_older=memory.level_older,
            factors=factors.contiguous(),
            velocity=velocity,
            latent_strides=latent.stride(),
            decoded_strides=decoded.stride(),
            anchor_strides=strides_of(memory.anchor),
            newest_strides=strides_of(memory.newest),
            older_strides=strides_of(memory.older),
            level_strides=tuple(map(level_stride, levels)),
            count=count,
            batch=batch,
            channels=channels,
            frames=frames,
            rows=rows,
            columns=columns,
            height=height,
            width=width,
            trust_speed=trust_speed,
            K=multiple,
            SIDE=side,
            KNOWN=sum(one is not None for one in (memory.newest, memory.older)),
            MEMORY=trust is not None,
            BLOCK=BLOCK,
        ),
    )


@library.custom_op("ddit::adapter_velocity", mutates_args=())
def adapter_velocity(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    side: int,
    decoded: torch.Tensor,
    residual: torch.Tensor,
    trust: torch.Tensor | None,
    trust_speed: float,
    anchor: torch.Tensor | None,
    newest: torch.Tensor | None,
    older: torch.Tensor | None,
    level_newest: torch.Tensor | None,
    level_older: torch.Tensor | None,
    factors: torch.Tensor,
) -> torch.Tensor:
    """The velocity, float32 (B, C, F, H, W); arguments as for :func:`velocity_launch`."""
    velocity = latent.new_empty(latent.shape, dtype=torch.float32)
    if velocity.numel():
        memory = BandMemory("clean", anchor, newest, older, None, None, level_newest, level_older)
        velocity_launch(
            latent, level, multiple, side, decoded, residual, trust, trust_speed, memory, factors, velocity
        ).run(latent.device)
    return velocity


@adapter_velocity.register_fake
def _(latent, *rest):  # type: ignore[no-untyped-def]
    return latent.new_empty(latent.shape, dtype=torch.float32)


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def adapter_velocity_reference(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    side: int,
    decoded: torch.Tensor,
    residual: torch.Tensor,
    trust: torch.Tensor | None,
    trust_speed: float,
    memory: BandMemory,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Plain PyTorch version of the kernel. See :func:`ddit_rt.ops.adapter_velocity`."""
    bottom, right = (decoded.shape[i] - latent.shape[i] for i in (3, 4))
    wide = partial(widened, bottom=bottom, right=right)
    down, up = partial(means, multiple=multiple), partial(repeated, multiple=multiple)

    scale, gain, _, unit = (per_sample(one) for one in factors.unbind(0))
    padded = noisy = wide(latent)
    out, correction = decoded.float().chunk(2, dim=1)
    newest = None if memory.newest is None else wide(memory.newest)
    if newest is not None:
        assert memory.anchor is not None
        noisy = padded - wide(memory.anchor) + per_sample(memory.level_newest).float() * newest
    flat = gain * down(out) + (1 / multiple - 1) * scale * down(padded)
    velocity = up(flat) + (noisy - up(down(noisy))) / per_sample(level).float()
    if newest is not None and trust is not None:
        forecast = newest
        if memory.older is not None:
            near = per_sample(memory.level_newest)
            share = ((per_sample(level) - near) / (near - per_sample(memory.level_older))).clamp(max=1.0).float()
            forecast = newest + share * (newest - wide(memory.older))
        velocity = velocity + trust_speed * trust.float().view(1, -1, 1, 1, 1) * (forecast - velocity)
    grid = (latent.shape[2], decoded.shape[3] // side, decoded.shape[4] // side)
    past = residual.float().reshape(len(latent), *grid, latent.shape[1], side, side).permute(0, 4, 1, 2, 5, 3, 6)
    velocity = velocity + unit * (correction + past.reshape(padded.shape))
    return velocity[..., : latent.shape[3], : latent.shape[4]].contiguous()
