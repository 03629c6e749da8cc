"""The exact quantile of non-negative float32 values by bit search: no sort, no histogram, deterministic.

The bits of a non-negative float32 order like its value, so 31 rounds of counting find the value of a given rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import library

from ddit_kernels._common import Launch, power_of_2, tl, triton

BLOCK = 16384  # values that one program keeps in registers; beyond, each of its rounds reads them again


def quantile_rank(count: int, quantile: float) -> tuple[int, int, float]:
    """The two ranks and the weight that define the quantile of ``count`` sorted values.

    r = quantile * (count - 1) in float64, lo = floor(r), hi = ceil(r), weight = r - lo; the quantile is the linear
    interpolation between the values of rank lo and hi. Written out because ``torch.quantile`` refuses more than 2^24
    values and its rank arithmetic changed between versions.
    """
    rank = float(quantile) * (count - 1)
    low = math.floor(rank)
    return low, math.ceil(rank), rank - low


def size_layout(
    counts: Sequence[int], patch_sizes: Sequence[int], quantile: float
) -> dict[str, tuple[int, ...] | tuple[float, ...]]:
    """Per size, finest first: start of its values in a sample's row (and the row's length), ranks, weights, codes."""
    order = sorted(range(len(patch_sizes)), key=lambda i: patch_sizes[i])
    starts = [0]
    for i in order:
        starts.append(starts[-1] + counts[i])
    ranks = [quantile_rank(counts[i], quantile) for i in order]
    return {
        "starts": tuple(starts),
        "ranks": tuple(low for low, _, _ in ranks),
        "weights": tuple(weight for _, _, weight in ranks),
        "codes": tuple(i + 1 for i in order),
    }


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def lerp(low, high, weight):
    """torch.lerp's formula with its roundings fixed, so that every kernel interpolates to the same bits."""
    gap = high - low
    return tl.where(weight < 0.5, tl.fma(weight, gap, low), tl.fma(weight - 1.0, gap, high))


@triton.jit
def _count_below(values, number, bits, BLOCK: tl.constexpr):
    """How many of ``number`` stored values have bits below ``bits``."""
    total = 0
    for first in range(0, number, BLOCK):
        place = first + tl.arange(0, BLOCK)
        chunk = tl.load(values + place, place < number, float("inf")).to(tl.int32, bitcast=True)
        total += tl.sum((chunk < bits).to(tl.int32), 0)
    return total


@triton.jit
def _quantile_kernel(
    stds,
    quantiles,
    starts,
    ranks,
    weights,
    codes,
    SIZES: tl.constexpr,
    ONCE: tl.constexpr,  # all values of the largest set fit in one block
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    stds += sample.to(tl.int64) * starts[SIZES]
    start = starts[0]
    number = starts[1] - start
    rank = ranks[0]
    weight = weights[0]
    code = codes[0]
    for slot in tl.static_range(1, SIZES):
        mine = tl.program_id(1) == slot
        start = tl.where(mine, starts[slot], start)
        number = tl.where(mine, starts[slot + 1] - starts[slot], number)
        rank = tl.where(mine, ranks[slot], rank)
        weight = tl.where(mine, weights[slot], weight)
        code = tl.where(mine, codes[slot], code)

    values = stds + start
    place = tl.arange(0, BLOCK)
    held = tl.load(values + place, place < number, float("inf")).to(tl.int32, bitcast=True)
    # The largest bit pattern with at most ``rank`` values below it is the value of that rank.
    low = number * 0
    for step in range(31):
        candidate = low | (1 << (30 - step))
        if ONCE:  # noqa: SIM108 -- Triton compiles only the branch taken of an if statement on a constexpr
            below = tl.sum((held < candidate).to(tl.int32), 0)
        else:
            below = _count_below(values, number, candidate, BLOCK)
        low = tl.where(below <= rank, candidate, low)
    if ONCE:
        upto = tl.sum((held <= low).to(tl.int32), 0)
        high = tl.min(tl.where(held > low, held, 0x7F800000), 0)
    else:
        upto = _count_below(values, number, low + 1, BLOCK)
        high = 0x7F800000
        for first in range(0, number, BLOCK):
            place = first + tl.arange(0, BLOCK)
            chunk = tl.load(values + place, place < number, float("inf")).to(tl.int32, bitcast=True)
            high = tl.minimum(high, tl.min(tl.where(chunk > low, chunk, 0x7F800000), 0))
    high = tl.where(upto > rank + 1, low, high)
    result = low.to(tl.float32, bitcast=True)
    if weight > 0.0:
        result = lerp(result, high.to(tl.float32, bitcast=True), weight)

    # A value that is not finite makes the coarsest patch around it infinite too; one sample, one verdict.
    bad = 0
    for first in range(starts[SIZES - 1], starts[SIZES], BLOCK):
        place = first + tl.arange(0, BLOCK)
        chunk = tl.load(stds + place, place < starts[SIZES], 0.0)
        bad = tl.maximum(bad, tl.max((chunk == float("inf")).to(tl.int32), 0))
    tl.store(quantiles + sample * SIZES + code - 1, tl.where(bad > 0, float("nan"), result))


# --- launcher ---------------------------------------------------------------------------------------------------------


def quantile_launch(
    stds: torch.Tensor, counts: Sequence[int], patch_sizes: Sequence[int], quantile: float, quantiles: torch.Tensor
) -> Launch:
    """Arguments of ``_quantile_kernel``.

    Args:
        stds: as ``_evolution_kernel`` wrote them, +inf where not finite.
        counts: patches per size, in the order of patch_sizes.
        quantiles: float32 (B, S), written, columns in the order of patch_sizes.
    """
    block = min(max(1024, power_of_2(max(counts))), BLOCK)
    return Launch(
        _quantile_kernel,
        (stds.shape[0], len(patch_sizes)),
        dict(
            stds=stds,
            quantiles=quantiles,
            **size_layout(counts, patch_sizes, quantile),
            SIZES=len(patch_sizes),
            ONCE=max(counts) <= block,
            BLOCK=block,
            num_warps=min(block // 256, 16),
        ),
    )


@library.custom_op("ddit::patch_std_quantile", mutates_args=())
def patch_std_quantile(stds: torch.Tensor, counts: list[int], patch_sizes: list[int], quantile: float) -> torch.Tensor:
    """Quantiles, float32 (B, S), of the standard deviations that :func:`evolution_select` returned."""
    quantiles = torch.empty(stds.shape[0], len(patch_sizes), dtype=torch.float32, device=stds.device)
    if stds.shape[0]:
        quantile_launch(stds, counts, patch_sizes, quantile, quantiles).run(stds.device)
    return quantiles


@patch_std_quantile.register_fake
def _(stds, counts, patch_sizes, quantile):  # type: ignore[no-untyped-def]
    return torch.empty(stds.shape[0], len(patch_sizes), dtype=torch.float32, device=stds.device)


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def quantile_reference(values: torch.Tensor, quantile: float) -> torch.Tensor:
    """Quantile of each row with linear interpolation: (B, N) float32 -> (B,) float32. NaNs must be handled before."""
    low, high, weight = quantile_rank(values.shape[1], quantile)
    ordered = values.sort(dim=1).values  # kthvalue is quadratic on falling values
    return torch.lerp(ordered[:, low], ordered[:, high], weight)
