"""The orthogonal split of a latent into a low band (means of patches) and what is left, and the flow-matching algebra.

With z = (1 - σ)x + σn, the mean over k x k pixels turns unit noise into noise of standard deviation 1/k, so down(z) is
a flow-matching state of a k times smaller latent at another noise level, up to a scale: s·down(z) with
s = 1/((1-σ) + σ/k) has noise share σ' = sσ/k and signal share s(1-σ), which add up to 1. Where a patch spans two latent
frames, its mean is one over 2·k² values, and √2·k takes the place of k.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F

from ..multiples import frames_of, noise_shrink, side_of
from .geometry import Geometry

Scalar: TypeAlias = float | torch.Tensor


def pad_to_grid(latent: torch.Tensor, geometry: Geometry, multiple: int) -> torch.Tensor:
    """Pads (B, C, F, H, W) by edge replication to a grid that ``multiple`` divides."""
    bottom, right = geometry.padding(multiple)
    behind = geometry.frame_padding(multiple)
    if behind:
        latent = torch.cat([latent, latent[:, :, -1:].expand(-1, -1, behind, -1, -1)], dim=2)
    if not bottom and not right:
        return latent
    # replicate padding takes 4-D input; frames ride along as channels
    padded = F.pad(latent.flatten(1, 2), (0, right, 0, bottom), mode="replicate")
    return padded.unflatten(1, latent.shape[1:3])


def crop_to_latent(latent: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Undoes :func:`pad_to_grid`."""
    return latent[..., : geometry.frames, : geometry.height, : geometry.width]


def down(latent: torch.Tensor, multiple: int) -> torch.Tensor:
    """Mean over k x k pixels (of each frame, or of two): (B, C, F, H, W) -> (B, C, F, H/k, W/k)."""
    side, span = side_of(multiple), frames_of(multiple)
    if span > 1:
        latent = latent.unflatten(2, (-1, span)).mean(3)
    if side == 1:
        return latent
    return F.avg_pool2d(latent.flatten(1, 2), side).unflatten(1, latent.shape[1:3])


def means(latent: torch.Tensor, geometry: Geometry, multiple: int) -> torch.Tensor:
    """:func:`down` of what is padded to the grid: (B, C, F, H, W) of a full step -> (B, C, F, H'/k, W'/k)."""
    return down(pad_to_grid(latent, geometry, multiple), multiple)


def up(latent: torch.Tensor, multiple: int) -> torch.Tensor:
    """Nearest-neighbour upsampling: (B, C, F, H, W) -> (B, C, F, kH, kW); down(up(x)) == x."""
    side, span = side_of(multiple), frames_of(multiple)
    if side > 1:
        larger = F.interpolate(latent.flatten(1, 2), scale_factor=side, mode="nearest")
        latent = larger.unflatten(1, latent.shape[1:3])
    return latent if span == 1 else latent.repeat_interleave(span, dim=2)


def high_band(latent: torch.Tensor, multiple: int) -> torch.Tensor:
    """What the k x k means leave out: z - up(down(z))."""
    return latent - up(down(latent, multiple), multiple)


def low_scale(sigma: Scalar, multiple: int) -> Scalar:
    """s = 1/((1-σ) + σ/k): makes noise share and signal share of the k x k means add up to 1."""
    return 1 / ((1 - sigma) + sigma / noise_shrink(multiple))


def low_state(latent: torch.Tensor, sigma: Scalar, multiple: int) -> tuple[torch.Tensor, Scalar]:
    """The low band as a flow-matching state of its own.

    Args:
        latent: (B, C, F, H, W) float32, H and W divisible by ``multiple``.
        sigma: Noise level σ in (0, 1].

    Returns:
        s·down(z) of shape (B, C, F, H/k, W/k), and its noise level σ' = sσ/k.
    """
    scale = low_scale(sigma, multiple)
    return scale * down(latent, multiple), scale * sigma / noise_shrink(multiple)


def low_velocity(low_latent: torch.Tensor, low_sigma: Scalar, prediction: torch.Tensor, multiple: int) -> torch.Tensor:
    """The low band of the full-resolution velocity from the model's prediction on the low state.

    x_low = s·down(z) - σ'v', e_low = s·down(z) + (1 - σ')v' (unit noise), v_low = e_low/k - x_low.
    """
    clean = low_latent - low_sigma * prediction
    noise = low_latent + (1 - low_sigma) * prediction
    return noise / noise_shrink(multiple) - clean


def noise_level(like: torch.Tensor, value: Scalar) -> torch.Tensor:
    """``value``, one for all samples or one each, in the shape, dtype and place of a timestep argument."""
    if isinstance(value, torch.Tensor):
        level = value.to(like)
        return level.expand(like.shape) if level.ndim == 0 else level.reshape(like.shape)
    return torch.full_like(like, value)
