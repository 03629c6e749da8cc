"""Closeness of a picture to the base model's own, by torchmetrics; frame by frame for videos."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ..schedule import PSNR_LIMIT


def psnr(images: torch.Tensor, base: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error over all values.

    Args:
        images, base: (..., 3, H, W) float in [0, 1].

    Returns:
        dB; infinity for equal pictures.
    """
    return float(peak_signal_noise_ratio(images, base, data_range=1.0))


def limited_psnr(images: torch.Tensor, base: torch.Tensor) -> float:
    """:func:`psnr`, at most :data:`PSNR_LIMIT`: what means are taken of."""
    return min(psnr(images, base), PSNR_LIMIT)


def ssim(images: torch.Tensor, base: torch.Tensor) -> float:
    """Structural similarity, Gaussian window 11 x 11 with σ = 1.5, mean over pictures.

    Only windows inside the picture count, as in Wang et al. 2004 and scikit-image; torchmetrics' own mean takes in a
    mirrored border too.

    Args:
        images, base: (..., 3, H, W) float in [0, 1], H and W at least 11.
    """
    _, windows = structural_similarity_index_measure(
        *frames_of_all(images, base), data_range=1.0, sigma=1.5, kernel_size=11, return_full_image=True
    )
    return float(windows[..., 5:-5, 5:-5].mean())


def frames_of_all(images: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 3, H, W) twice as (N, 3, H, W) twice."""
    return images.reshape(-1, *images.shape[-3:]), base.reshape(-1, *base.shape[-3:])
