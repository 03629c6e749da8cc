"""How much a latent's n-th difference varies inside its patches, and the patch size that follows from it.

For increments d_0 (newest), d_1, ... of a sampler, the n-th difference is sum_i (-1)^i C(n-1, i) d_i. Its population
standard deviation is taken over the channels and pixels of every patch, then the rho-quantile over all patches of a
sample (DDiT, arXiv 2602.16968, section 3). Small quantiles mean that coarse patches lose nothing.

One launch reads every increment once, stores the standard deviations and decides: whether the quantile is below the
threshold follows from how many values are, and, where the interpolation straddles it, from its two neighbours. The
quantile values, which nobody waits for, are a second launch (``patch_quantile.py``). Everything that crosses programs
is an integer atomic, so the same input gives the same bits every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import library

from ddit_kernels._common import Launch, latent_shape, memory_span, power_of_2, split_strides, tl, triton, unpack_latent
from ddit_kernels._workspace import zeroed
from ddit_kernels.patch_quantile import lerp, quantile_reference, size_layout

MAX_ORDER = 3
MAX_TILE = 8192  # values of one coarsest patch, channels rounded up to a power of two, that a program can hold
MAX_SIZES = 4
WORKSPACE = 16  # int32 per sample: ticket, not-finite flag, then (count, largest below, smallest above) per size

# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _morton(index, LEVELS: tl.constexpr):
    """(row, column) of a patch among 4^LEVELS siblings in Z order: four neighbours make one patch of the next size."""
    row = index * 0
    column = index * 0
    for level in tl.static_range(LEVELS):
        row += ((index >> (2 * level + 1)) & 1) << level
        column += ((index >> (2 * level)) & 1) << level
    return row, column


@triton.jit
def _evolution_kernel(
    d0,
    d1,
    d2,
    stds,
    decision,
    workspace,
    strides,  # (batch, channel, frame, row block, row, column block, column)
    starts,  # per size, finest first: where its standard deviations start; last, where the next sample's do
    ranks,  # per size: low rank of the quantile
    weights,  # per size: weight of the next rank
    codes,  # per size: the decision if it is the coarsest that qualifies
    threshold,
    channels,
    frames,
    height,
    width,
    ORDER: tl.constexpr,
    SPLIT: tl.constexpr,  # 2: a packed token holds 2 x 2 pixels; 1: plain strides
    BLOCK_C: tl.constexpr,
    FINE: tl.constexpr,  # side of the finest patch
    SLOTS: tl.constexpr,  # for the sides FINE, 2 * FINE, 4 * FINE, ...: position among the sizes asked for, or -1
    SIZES: tl.constexpr,
    LEVELS: tl.constexpr,
    PATCHES: tl.constexpr,  # coarsest patches per program
    WORKSPACE: tl.constexpr,
):
    COARSE: tl.constexpr = FINE << (LEVELS - 1)
    SIBLINGS: tl.constexpr = 4 ** (LEVELS - 1)
    sample = tl.program_id(1)
    rows = tl.cdiv(height, COARSE)
    columns = tl.cdiv(width, COARSE)

    # Rows of the tile are finest patches, columns their values; offsets inside a sample fit in 32 bits (launcher).
    fine = tl.arange(0, PATCHES * SIBLINGS)
    patch = tl.program_id(0) * PATCHES + fine // SIBLINGS
    frame = patch // (rows * columns)
    inside_row, inside_column = _morton(fine % SIBLINGS, LEVELS - 1)
    top = patch // columns % rows * COARSE + inside_row * FINE
    left = patch % columns * COARSE + inside_column * FINE
    value = tl.arange(0, BLOCK_C * FINE * FINE)
    channel = value // (FINE * FINE)
    y = top[:, None] + (value // FINE % FINE)[None, :]
    x = left[:, None] + (value % FINE)[None, :]
    mask = (frame < frames)[:, None] & (channel < channels)[None, :] & (y < height) & (x < width)
    offset = frame[:, None] * strides[2] + channel[None, :] * strides[1]
    offset += y // SPLIT * strides[3] + x // SPLIT * strides[5]
    if SPLIT > 1:
        offset += y % SPLIT * strides[4] + x % SPLIT * strides[6]
    start = sample.to(tl.int64) * strides[0]
    z = tl.load(d0 + start + offset, mask, 0.0).to(tl.float32)
    if ORDER == 2:
        z -= tl.load(d1 + start + offset, mask, 0.0).to(tl.float32)
    if ORDER == 3:
        z -= 2.0 * tl.load(d1 + start + offset, mask, 0.0).to(tl.float32)
        z += tl.load(d2 + start + offset, mask, 0.0).to(tl.float32)

    # Moments of the finest patches in two passes. Patches at the edge count the values they have.
    count = tl.minimum(tl.maximum(height - top, 0), FINE) * tl.minimum(tl.maximum(width - left, 0), FINE)
    count = tl.where(frame < frames, count * channels, 0).to(tl.float32)
    mean = tl.div_rn(tl.sum(z, 1), tl.maximum(count, 1.0))
    deviation = tl.where(mask, z - mean[:, None], 0.0)
    m2 = tl.sum(deviation * deviation, 1)

    state = workspace + sample * WORKSPACE
    stds += sample.to(tl.int64) * starts[SIZES]
    for level in tl.static_range(LEVELS):
        if level > 0:
            # Chan's merge of four siblings keeps its digits where a naive sum of squares cancels.
            counts = tl.reshape(count, (PATCHES * SIBLINGS >> (2 * level), 4))
            means = tl.reshape(mean, (PATCHES * SIBLINGS >> (2 * level), 4))
            m2s = tl.reshape(m2, (PATCHES * SIBLINGS >> (2 * level), 4))
            count = tl.sum(counts, 1)
            mean = tl.div_rn(tl.sum(means * counts, 1), tl.maximum(count, 1.0))
            apart = means - mean[:, None]
            m2 = tl.sum(m2s + apart * apart * counts, 1)
        if SLOTS[level] >= 0:
            std = tl.sqrt_rn(tl.div_rn(m2, tl.maximum(count, 1.0)))
            exists = count > 0.0
            finite = std < float("inf")  # false for NaN too
            std = tl.where(finite, std, float("inf"))
            inside = tl.arange(0, PATCHES * SIBLINGS >> (2 * level))
            patch = tl.program_id(0) * PATCHES + inside // (SIBLINGS >> (2 * level))
            inside_row, inside_column = _morton(inside % (SIBLINGS >> (2 * level)), LEVELS - 1 - level)
            row = patch // columns % rows * (1 << (LEVELS - 1 - level)) + inside_row
            column = patch % columns * (1 << (LEVELS - 1 - level)) + inside_column
            line = patch // (rows * columns) * tl.cdiv(height, FINE << level) + row
            where = starts[SLOTS[level]] + line * tl.cdiv(width, FINE << level) + column
            tl.store(stds + where, std, exists)

            bits = std.to(tl.int32, bitcast=True)  # not negative, so the bits order like the values
            below = exists & (std < threshold)
            number = tl.sum(below.to(tl.int32), 0)
            largest = tl.max(tl.where(below, bits, 0), 0)
            # Kept as a distance from the largest int32, so that zero is neutral for every field.
            smallest = tl.max(tl.where(exists & (std >= threshold), 0x7FFFFFFF - bits, 0), 0)
            bad = tl.max((exists & (std == float("inf"))).to(tl.int32), 0)
            field = state + 2 + 3 * SLOTS[level]
            tl.atomic_add(field, number, number > 0, sem="relaxed")
            tl.atomic_max(field + 1, largest, largest > 0, sem="relaxed")
            tl.atomic_max(field + 2, smallest, smallest > 0, sem="relaxed")
            tl.atomic_max(state + 1, bad, bad > 0, sem="relaxed")

    # The last program of a sample decides and leaves the workspace zeroed for the next launch or graph replay. The
    # barrier orders the whole program's atomics before the one thread that takes the ticket.
    tl.debug_barrier()
    ticket = tl.atomic_add(state, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        choice = 0
        for slot in tl.static_range(SIZES):
            field = state + 2 + 3 * slot
            number = tl.atomic_xchg(field, 0)
            low = tl.atomic_xchg(field + 1, 0).to(tl.float32, bitcast=True)
            high = (0x7FFFFFFF - tl.atomic_xchg(field + 2, 0)).to(tl.float32, bitcast=True)
            # Ranks 0 .. number - 1 are below the threshold. Only if the two ranks of the quantile lie on either side
            # of it do the values matter, and then they are exactly the two neighbours of the threshold.
            straddles = (number == ranks[slot] + 1) & (weights[slot] > 0.0)
            qualifies = tl.where(straddles, lerp(low, high, weights[slot]) < threshold, number > ranks[slot])
            choice = tl.where(qualifies, codes[slot], choice)
        bad = tl.atomic_xchg(state + 1, 0)
        tl.store(decision + sample, tl.where(bad > 0, 0, choice))
        tl.atomic_xchg(state, 0)


# --- launcher ---------------------------------------------------------------------------------------------------------


def evolution_unsupported(
    increments: Sequence[torch.Tensor], patch_sizes: Sequence[int], packed: tuple[int, int] | None
) -> str | None:
    """Why the kernel cannot take these arguments, ``None`` if it can."""
    finest, coarsest, channels = min(patch_sizes), max(patch_sizes), latent_shape(increments[0], packed)[1]
    if len(increments) > MAX_ORDER:
        return f"the kernel takes differences up to order {MAX_ORDER}, got {len(increments)} increments."
    if any(size & (size - 1) for size in patch_sizes) or len(patch_sizes) > MAX_SIZES:
        return f"the kernel takes up to {MAX_SIZES} patch sizes, powers of two, got {list(patch_sizes)}."
    if power_of_2(channels) * coarsest**2 > MAX_TILE:
        return f"a patch of {channels} x {coarsest} x {coarsest} values exceeds the kernel's {MAX_TILE}."
    if coarsest // finest > 16:
        return f"the kernel takes patch sizes within a factor of 16, got {list(patch_sizes)}."
    if any(memory_span(x.shape[1:], x.stride()[1:]) >= 2**31 for x in increments):
        return "a sample spans more than 2^31 values in memory; make the increments contiguous."
    return None


def patch_counts(frames: int, height: int, width: int, patch_sizes: Sequence[int]) -> list[int]:
    """Number of patches of every size in one sample of ``frames`` x ``height`` x ``width`` latent pixels."""
    return [frames * -(-height // size) * -(-width // size) for size in patch_sizes]


def evolution_launch(
    increments: Sequence[torch.Tensor],
    patch_sizes: Sequence[int],
    quantile: float,
    threshold: float,
    packed: Sequence[int] | None,
    stds: torch.Tensor,
    decision: torch.Tensor,
    workspace: torch.Tensor,
) -> Launch:
    """Arguments of ``_evolution_kernel``.

    Args:
        increments: 1 to 3 tensors of one shape, (B, C, H, W), (B, C, F, H, W) or packed (B, h*w, C*4).
        patch_sizes: powers of two, in latent pixels, in any order.
        packed: token grid (h, w) of packed increments.
        stds: float32 (B, sum of patch counts), written: per sample the sizes in ascending order, patches row-major.
        decision: int32 (B,), written; device or pinned host memory.
        workspace: int32 (at least B * WORKSPACE,), zero before and after.
    """
    if any(increment.stride() != increments[0].stride() for increment in increments):
        increments = [increment.contiguous() for increment in increments]
    batch, channels, frames, height, width = latent_shape(increments[0], packed)
    sizes, finest, coarsest = sorted(patch_sizes), min(patch_sizes), max(patch_sizes)
    levels = (coarsest // finest).bit_length()
    slots = tuple(sizes.index(finest << level) if finest << level in sizes else -1 for level in range(levels))
    patch_values = power_of_2(channels) * coarsest**2
    patches = max(1, 2048 // patch_values)
    tiles = -(-patch_counts(frames, height, width, [coarsest])[0] // patches)
    layout = size_layout(patch_counts(frames, height, width, patch_sizes), patch_sizes, quantile)
    d0, d1, d2 = increments[0], increments[min(1, len(increments) - 1)], increments[-1]
    return Launch(
        _evolution_kernel,
        (tiles, batch),
        dict(
            d0=d0,
            d1=d1,
            d2=d2,
            stds=stds,
            decision=decision,
            workspace=workspace,
            strides=split_strides(d0, packed),
            **layout,
            threshold=float(threshold),
            channels=channels,
            frames=frames,
            height=height,
            width=width,
            ORDER=len(increments),
            SPLIT=1 if packed is None else 2,
            BLOCK_C=power_of_2(channels),
            FINE=finest,
            SLOTS=slots,
            SIZES=len(sizes),
            LEVELS=levels,
            PATCHES=patches,
            WORKSPACE=WORKSPACE,
            num_warps=4 if patch_values <= 2048 else 8,
        ),
    )


@library.custom_op("ddit::evolution_select", mutates_args=("decision",))
def evolution_select(
    increments: list[torch.Tensor],
    patch_sizes: list[int],
    quantile: float,
    threshold: float,
    packed: list[int] | None,
    decision: torch.Tensor,
) -> torch.Tensor:
    """Writes the decision, int32 (B,), and returns the standard deviations, float32 (B, sum of patch counts)."""
    batch, _, frames, height, width = latent_shape(increments[0], packed)
    total = sum(patch_counts(frames, height, width, patch_sizes))
    stds = torch.empty(batch, total, dtype=torch.float32, device=increments[0].device)
    if batch:
        workspace = zeroed(stds.device, batch * WORKSPACE)
        launch = evolution_launch(increments, patch_sizes, quantile, threshold, packed, stds, decision, workspace)
        launch.run(stds.device)
    return stds


@evolution_select.register_fake
def _(increments, patch_sizes, quantile, threshold, packed, decision):  # type: ignore[no-untyped-def]
    batch, _, frames, height, width = latent_shape(increments[0], packed)
    total = sum(patch_counts(frames, height, width, patch_sizes))
    return torch.empty(batch, total, dtype=torch.float32, device=increments[0].device)


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def difference_reference(increments: Sequence[torch.Tensor]) -> torch.Tensor:
    """n-th difference of n increments of one shape, newest first, in float32."""
    order = len(increments)
    total = increments[0].float()
    for i in range(1, order):
        total = torch.add(total, increments[i].float(), alpha=(-1) ** i * math.comb(order - 1, i))
    return total


def _pool(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """(N, H, W): mean over ratio x ratio blocks; blocks at the edge use the values that exist."""
    if ratio == 1:
        return x
    return F.avg_pool2d(x[:, None], ratio, ceil_mode=True, count_include_pad=False)[:, 0]


def _spread(x: torch.Tensor, ratio: int, like: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour inverse of :func:`_pool`, cropped to the last two axes of ``like``."""
    if ratio == 1:
        return x
    height, width = like.shape[-2:]
    return x.repeat_interleave(ratio, -2)[..., :height, :].repeat_interleave(ratio, -1)[..., :width]


def _pixels(height: int, width: int, size: int, device: torch.device) -> torch.Tensor:
    """How many of its size*size pixels each patch really has: (ceil(height/size), ceil(width/size)) float32."""
    rows = (height - torch.arange(0, height, size, device=device)).clamp(max=size)
    columns = (width - torch.arange(0, width, size, device=device)).clamp(max=size)
    return (rows[:, None] * columns[None, :]).float()


def patch_std_reference(difference: torch.Tensor, patch_sizes: Sequence[int]) -> dict[int, torch.Tensor]:
    """Population standard deviation inside every patch, for every size.

    Two passes (mean, then squared deviations) at the finest size; coarser sizes merge finer patches with Chan's formula
    where one size divides the other, so that a large mean costs no precision.

    Args:
        difference: (B, C, F, H, W) float32.
        patch_sizes: patch sides in latent pixels.

    Returns:
        size -> (B, F * ceil(H/size) * ceil(W/size)) float32, row-major in (frame, row, column).
    """
    batch, channels, frames, height, width = difference.shape
    planes = difference.transpose(1, 2).reshape(batch * frames, channels, height, width)
    pixel_mean = planes.mean(1)
    moments: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # size -> mean, M2 / channels, pixels
    result = {}
    for size in sorted(set(patch_sizes)):
        pixels = _pixels(height, width, size, difference.device)
        divisors = [s for s in moments if size % s == 0]  # ascending
        if divisors:
            finer = divisors[-1]
            fine_mean, fine_m2, fine_pixels = moments[finer]
            ratio = size // finer
            blocks = _pixels(fine_mean.shape[-2], fine_mean.shape[-1], ratio, difference.device)
            mean = _pool(fine_mean * fine_pixels, ratio) * (blocks / pixels)
            spread = fine_m2 + (fine_mean - _spread(mean, ratio, fine_mean)).square() * fine_pixels
            m2 = _pool(spread, ratio) * blocks
        else:
            mean = _pool(pixel_mean, size)
            deviation = planes - _spread(mean, size, pixel_mean)[:, None]
            m2 = _pool(deviation.square_().mean(1), size) * pixels
        moments[size] = mean, m2, pixels
        result[size] = (m2 / pixels).sqrt().reshape(batch, frames * pixels.numel())
    return result


def latent_evolution_reference(
    increments: Sequence[torch.Tensor],
    patch_sizes: Sequence[int],
    quantile: float,
    packed: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Plain PyTorch version of the kernel, and the one that runs on CPU. See :func:`ddit_rt.ops.latent_evolution`."""
    with torch.no_grad():
        difference = difference_reference(increments)
        if packed is not None:
            difference = unpack_latent(difference, packed)
        if difference.dim() == 4:
            difference = difference.unsqueeze(2)
        stds = patch_std_reference(difference, patch_sizes)
        finite = torch.stack([stds[size].isfinite().all(1) for size in patch_sizes]).all(0)
        values = [quantile_reference(stds[size].nan_to_num(0.0), quantile) for size in patch_sizes]
        return torch.stack(values, 1).masked_fill(~finite[:, None], math.nan)


def select_reference(quantiles: torch.Tensor, patch_sizes: Sequence[int], threshold: float) -> torch.Tensor:
    """1 + position of the largest patch size whose quantile is below threshold, 0 if none: (B, S) -> (B,) int32."""
    decision = torch.zeros(quantiles.shape[0], dtype=torch.int32, device=quantiles.device)
    for position in sorted(range(len(patch_sizes)), key=lambda i: patch_sizes[i]):
        decision.masked_fill_(quantiles[:, position] < threshold, position + 1)
    return decision
