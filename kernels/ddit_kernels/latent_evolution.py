"""How much a latent's n-th difference varies inside its patches, and the patch size that follows from it.

For increments d_0 (newest), d_1, ... of a sampler, the n-th difference is sum_i (-1)^i C(n-1, i) d_i. Its population
standard deviation is taken over the channels and pixels of every patch, then the rho-quantile over all patches of a
sample (DDiT, arXiv 2602.16968, section 3). Small quantiles mean that coarse patches lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ddit_kernels._common import unpack_latent


def quantile_rank(count: int, quantile: float) -> tuple[int, int, float]:
    """The two ranks and the weight that define the quantile of ``count`` sorted values.

    r = quantile * (count - 1) in float64, lo = floor(r), hi = ceil(r), weight = r - lo; the quantile is the linear
    interpolation between the values of rank lo and hi. Written out because ``torch.quantile`` refuses more than 2^24
    values and its rank arithmetic changed between versions.
    """
    rank = quantile * (count - 1)
    low = math.floor(rank)
    return low, math.ceil(rank), rank - low


# --- PyTorch reference ------------------------------------------------------------------------------------------------


def difference_reference(increments: Sequence[torch.Tensor]) -> torch.Tensor:
    """n-th difference of n increments of one shape, newest first, in float32."""
    order = len(increments)
    total = increments[0].float()
    for i in range(1, order):
        total = torch.add(total, increments[i].float(), alpha=(-1) ** i * math.comb(order - 1, i))
    return total


def _pool(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """Mean over ratio x ratio blocks of the last two axes; blocks at the edge use the values that exist."""
    if ratio == 1:
        return x
    return F.avg_pool2d(x, ratio, ceil_mode=True, count_include_pad=False)


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
        finer = max((s for s in moments if size % s == 0), default=0)
        if finer:
            fine_mean, fine_m2, fine_pixels = moments[finer]
            ratio = size // finer
            blocks = _pixels(*fine_mean.shape[-2:], ratio, difference.device)
            mean = _pool(fine_mean * fine_pixels, ratio) * (blocks / pixels)
            spread = fine_m2 + (fine_mean - _spread(mean, ratio, fine_mean)).square() * fine_pixels
            m2 = _pool(spread, ratio) * blocks
        else:
            mean = _pool(pixel_mean, size)
            deviation = planes - _spread(mean, size, pixel_mean)[:, None]
            m2 = _pool(deviation.square_().mean(1), size) * pixels
        moments[size] = mean, m2, pixels
        result[size] = (m2 / pixels).sqrt().reshape(batch, -1)
    return result


def quantile_reference(values: torch.Tensor, quantile: float) -> torch.Tensor:
    """Quantile of each row with linear interpolation: (B, N) float32 -> (B,) float32. NaNs must be handled before."""
    low, high, weight = quantile_rank(values.shape[1], quantile)
    below = values.kthvalue(low + 1, dim=1).values
    above = below if high == low else values.kthvalue(high + 1, dim=1).values
    return torch.lerp(below, above, weight)


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
