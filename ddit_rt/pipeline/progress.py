"""What is told of a step that has ended, and where its prediction points to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..granularity import Geometry, VariancePreserving, unpatchify


@dataclass(frozen=True)
class Progress:
    """A step that has ended.

    Attributes:
        index: From 0.
        steps: Of the call.
        multiple: Patch size of the step; 0 for a step without a model call.
        clean: Makes the latent that the step's prediction points to, float32 (B, C, F, H, W) in the scheduler's space,
            where the latents are; None where the noise level cannot be told. Given frames that the scheduler does not
            step (LTX-2) are as given; Wan 2.2 TI2V-5B's are stepped and put back after the last step, and mean nothing.
    """

    index: int
    steps: int
    multiple: int
    clean: Callable[[], torch.Tensor | None]


Watcher = Callable[[Progress], None]


def clean_latent(
    output: torch.Tensor,
    sample: torch.Tensor,
    sigma: float,
    process: VariancePreserving | None,
    geometry: Geometry | None,
    packing: tuple[int, ...] | None,
    first: torch.Tensor | None,
) -> torch.Tensor | None:
    """Where a prediction points to.

    Args:
        output: Prediction with guidance applied.
        sample: Latent that it was made for, the same shape.
        sigma: Noise level of it; NaN where it cannot be told.
        process: Of the latents; None for a flow's.
        geometry: Of the latent.
        packing: As of :meth:`ddit_rt.families.Family.packing`.
        first: (B or more, C, F, H, W) of the first step, whose leading frames those are that the scheduler leaves out.

    Returns:
        float32 (B, C, F, H, W), or None where there is no telling.
    """
    if sigma != sigma:
        return None
    state = sample.float()
    if process is None:
        clean = state - sigma * output.float()
    else:
        state = process.state(state, sigma)
        clean = state - sigma * process.velocity(output.float(), state, sigma)
    if packing is not None and clean.ndim == 3:
        if geometry is None:
            return None
        side = geometry.patch if len(packing) == 2 else 1
        rows, columns = packing[-2:]
        frames = geometry.frames
        return unpatchify(clean, side, frames, rows // frames if len(packing) == 2 else rows, columns)
    if clean.ndim == 4:
        return clean.unsqueeze(2)
    if first is None or first.shape[2] == clean.shape[2]:
        return clean
    given = first[: len(clean), :, : first.shape[2] - clean.shape[2]]
    return torch.cat([given.float(), clean], dim=2)
