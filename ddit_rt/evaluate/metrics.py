"""Similarity to the base model's own picture, by torchmetrics."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


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

    Args:
        images, base: (..., 3, H, W) float in [0, 1].
    """
    flat = images.reshape(-1, *images.shape[-3:]), base.reshape(-1, *base.shape[-3:])
    value = structural_similarity_index_measure(*flat, data_range=1.0, sigma=1.5, kernel_size=11)
    return float(value)  # type: ignore[arg-type]
