"""PI-resize of patch embeddings and de-embeddings (FlexiViT, arXiv 2212.08013, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .errors import ConfigError


def bilinear_matrix(patch_size: int, multiple: int) -> torch.Tensor:
    """B with B @ x = the bilinear upsampling of a flattened p x p patch to kp x kp (edges clamped).

    Returns:
        float64 ((k·p)², p²), rows and columns row-major.
    """
    basis = torch.eye(patch_size**2, dtype=torch.float64).reshape(-1, 1, patch_size, patch_size)
    side = multiple * patch_size
    resized = F.interpolate(basis, size=(side, side), mode="bilinear", align_corners=False)
    return resized.reshape(patch_size**2, side * side).T


def pi_resize_embed(weight: torch.Tensor, k: int) -> torch.Tensor:
    """Resizes a patch embedding so that bilinearly upsampled patches give the tokens that the patches gave.

    w_k = pinv(Bᵀ) w per input and output channel; the bias stays as it is.

    Args:
        weight: (d, C, p, p), as a convolution keeps it.
        k: Multiple of the patch size, >= 1.

    Returns:
        (d, C, k·p, k·p), same dtype and device.

    Raises:
        ConfigError: the weight is not (d, C, p, p), or k < 1.
    """
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ConfigError(f"weight of shape {tuple(weight.shape)}: a patch embedding is (d, C, p, p).")
    _check_multiple(k)
    patch_size = weight.shape[2]
    inverse = torch.linalg.pinv(bilinear_matrix(patch_size, k).T).to(weight.device)
    resized = weight.double().flatten(2) @ inverse.T
    return resized.unflatten(2, (k * patch_size, k * patch_size)).to(weight.dtype)


def pi_resize_deembed(
    weight: torch.Tensor, bias: torch.Tensor | None, k: int, *, patch_size: int = 2
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Resizes a de-embedding so that its output is the bilinear upsampling of the base output.

    Args:
        weight: (p·p·C, d), rows ordered (row, column, channel) as diffusers' ``proj_out`` has them.
        bias: (p·p·C,) or None.
        k: Multiple of the patch size, >= 1.
        patch_size: p, which the row count alone does not tell; 2 in FLUX and Wan.

    Returns:
        Weight ((k·p)²·C, d) and bias ((k·p)²·C,) or None, in the same row order, dtype and device.

    Raises:
        ConfigError: the rows are no multiple of p², or k < 1.
    """
    _check_multiple(k)
    if weight.ndim != 2 or weight.shape[0] % patch_size**2:
        raise ConfigError(f"weight of shape {tuple(weight.shape)}: a de-embedding is (p·p·C, d) with p={patch_size}.")
    matrix = bilinear_matrix(patch_size, k).to(weight.device)

    def resize(rows: torch.Tensor) -> torch.Tensor:
        per_pixel = rows.double().unflatten(0, (patch_size**2, -1))
        return torch.einsum("qp,p...->q...", matrix, per_pixel).flatten(0, 1).to(rows.dtype)

    return resize(weight), None if bias is None else resize(bias)


def _check_multiple(k: int) -> None:
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"k={k!r}: the multiple of the patch size is a whole number >= 1.")
