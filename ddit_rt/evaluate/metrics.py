"""Likeness to the base model's own picture, by torchmetrics; frame by frame for videos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ..errors import DDiTError


class MetricUnavailableError(DDiTError):
    """A metric's package or weights are not to be had here; the text says which and how to get them."""


def psnr(images: torch.Tensor, base: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error over all values.

    Args:
        images, base: (..., 3, H, W) float in [0, 1].

    Returns:
        dB; infinity for equal pictures.
    """
    return float(peak_signal_noise_ratio(images, base, data_range=1.0))


def ssim(images: torch.Tensor, base: torch.Tensor) -> float:
    """Structural similarity, Gaussian window 11 x 11 with σ = 1.5, mean over pictures.

    Only windows inside the picture count, as in Wang et al. 2004 and scikit-image; torchmetrics' own mean takes in a
    mirrored border too.

    Args:
        images, base: (..., 3, H, W) float in [0, 1], H and W at least 11.
    """
    _, windows = structural_similarity_index_measure(
        *_flat(images, base), data_range=1.0, sigma=1.5, kernel_size=11, return_full_image=True
    )
    return float(windows[..., 5:-5, 5:-5].mean())


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
    "psnr": lambda: psnr,
    "ssim": lambda: ssim,
    "lpips": lpips,
}
"""Metrics of a picture and its base picture: name -> loader of (images, base) -> value."""


def unavailable(metric: str, needs: str, error: Exception) -> MetricUnavailableError:
    """The error for a metric that cannot be loaded."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return MetricUnavailableError(
        f"{metric} needs {needs} (pip install 'ddit-rt[eval]', and a connection once): {type(error).__name__}: {reason}"
    )


def _flat(images: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.reshape(-1, *images.shape[-3:]), base.reshape(-1, *base.shape[-3:])
