"""Likeness to the plain and to the converged picture, by torchmetrics; frame by frame for videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..trajectories import frames_of_all as _flat
from ..trajectories import limited_psnr, ssim
from .unavailable import unavailable

Judge = Callable[[Sequence[Path], Sequence[Path], Sequence[str]], list[float]]
"""(pictures, base pictures, prompts), in the same order -> a value per picture that has one, or one for the set."""


def lpips() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Loads LPIPS (AlexNet, Zhang et al. 2018).

    Returns:
        (images, base), both (..., 3, H, W) in [0, 1] -> mean distance.

    Raises:
        MetricUnavailableError: torchvision or the AlexNet weights are missing.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        model = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except Exception as error:  # an absent package and a refused download come as many types
        raise unavailable("LPIPS", "torchvision and its AlexNet weights", error) from error
    return lambda images, base: float(model(*_flat(images.clamp(0, 1), base.clamp(0, 1))))


PAIRED: dict[str, Callable[[], Callable[[torch.Tensor, torch.Tensor], float]]] = {
    "psnr": lambda: limited_psnr,
    "ssim": lambda: ssim,
    "lpips": lpips,
}
"""Metrics of a picture and its base picture: name -> loader of (images, base) -> value."""

TO_CONVERGED = {name: f"{name}_converged" for name in PAIRED}
"""Metric -> its name where the base is the converged picture and not the plain one."""
