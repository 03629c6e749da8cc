"""Band arithmetic that PyTorch references of several kernels share; latents (B, C, F, H, W), float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def widened(tensor: torch.Tensor, bottom: int, right: int) -> torch.Tensor:
    """In float32, padded by so many rows and columns of edge replication."""
    padded = F.pad(tensor.float().flatten(1, 2), (0, right, 0, bottom), mode="replicate")
    return padded.unflatten(1, tensor.shape[1:3])


def means(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Means of k x k pixels."""
    return F.avg_pool2d(tensor.flatten(1, 2), multiple).unflatten(1, tensor.shape[1:3])


def repeated(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Every pixel k x k times."""
    return tensor.repeat_interleave(multiple, 3).repeat_interleave(multiple, 4)


def per_sample(value: torch.Tensor | None) -> torch.Tensor:
    """One number, or one a sample, to go with a latent."""
    assert value is not None
    return value.reshape(-1, 1, 1, 1, 1)
