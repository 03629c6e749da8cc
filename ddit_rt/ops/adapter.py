"""What lies around the transformer in an adapter's coarse step: two operations over two backends, as the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ddit_kernels.adapter_features import adapter_features as adapter_features_triton
from ddit_kernels.adapter_features import adapter_features_reference
from ddit_kernels.adapter_velocity import adapter_velocity as adapter_velocity_triton
from ddit_kernels.adapter_velocity import adapter_velocity_reference
from ddit_kernels.band_rest import BandMemory, band_unsupported

from .arguments import check_adapter
from .operations import resolved


@dataclass(frozen=True)
class AdapterFeatures:
    """What :func:`adapter_features` gives.

    Attributes:
        features: (B, C', F, rows, columns) in the latent's dtype: C' = C + 1, with memory 3·C + 3.
        factors: float32 (4, B), for :func:`adapter_velocity`.
        level: σ', a 0-dim tensor where σ was one, else (B,); float32.
    """

    features: torch.Tensor
    factors: torch.Tensor
    level: torch.Tensor


def adapter_features(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    grid: tuple[int, int],
    memory: BandMemory,
    reads_memory: bool,
    *,
    backend: str = "auto",
) -> AdapterFeatures:
    """What an adapter reads (:class:`ddit_rt.granularity.AdapterSpec`), extended to the grid by repeating the edge.

    Args:
        latent: z, (B, C, F, H, W), float32, bfloat16 or float16, any strides.
        level: σ, a float tensor of one element or B.
        multiple: k.
        grid: Pixels of the result, (rows, columns); at least (H, W).
        memory: ``newest`` and ``older`` predictions of the last full steps and their levels, those that there are.
        reads_memory: Whether the adapter was made to.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    check_adapter(latent, level, multiple, grid, memory)
    apart = None
    if reads_memory and memory.newest is not None and memory.older is not None:
        apart = _apart(memory.newest, memory.older, grid)
    unsupported = band_unsupported(multiple, latent, memory.newest, memory.older)
    if resolved(backend, unsupported, latent, memory.newest, memory.older) == "torch":
        found = adapter_features_reference(latent, level, multiple, grid, reads_memory, memory, apart)
    else:
        known = (memory.newest, memory.older, memory.level_newest, memory.level_older)
        found = adapter_features_triton(latent, level, multiple, list(grid), reads_memory, *known, apart)
    features, factors = found
    return AdapterFeatures(features, factors, factors[2, 0] if level.dim() == 0 else factors[2])


def adapter_velocity(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    decoded: torch.Tensor,
    residual: torch.Tensor,
    side: int,
    memory: BandMemory,
    factors: torch.Tensor,
    *,
    trust: torch.Tensor | None = None,
    trust_speed: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """The velocity of an adapter's coarse step (:mod:`ddit_rt.granularity.paths.adapter`).

    Args:
        latent, level, multiple: As for :func:`adapter_features`.
        decoded: (B, 2·C, F, rows, columns), the de-embedding's prediction of v' and its correction.
        residual: (B, N, C·side·side), what the residual block adds to the correction, values of a token ordered
            (channel, row, column).
        side: k·p.
        memory: As for :func:`adapter_features`, with ``anchor``, the latent of the last full step.
        factors: Of :func:`adapter_features`.
        trust, trust_speed: (C,), and what it is multiplied with; None without memory.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        float32 (B, C, F, H, W).

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    rows, columns = decoded.shape[3:]
    check_adapter(latent, level, multiple, (rows, columns), memory)
    tensors = (decoded, residual, memory.anchor, memory.newest, memory.older)
    unsupported = band_unsupported(multiple, latent, *tensors)
    if resolved(backend, unsupported, latent, *tensors, trust) == "torch":
        known = (trust, trust_speed, memory, factors)
        return adapter_velocity_reference(latent, level, multiple, side, decoded, residual, *known)
    steps = (*tensors[2:], memory.level_newest, memory.level_older)
    found: torch.Tensor = adapter_velocity_triton(
        latent, level, multiple, side, decoded, residual.contiguous(), trust, trust_speed, *steps, factors
    )
    return found


def _apart(newest: torch.Tensor, older: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Root mean square of the difference of two predictions over the grid that they are extended to, float32 (B,)."""
    difference = newest.float() - older
    bottom, right = grid[0] - newest.shape[3], grid[1] - newest.shape[4]
    if bottom or right:
        difference = torch.nn.functional.pad(difference.flatten(1, 2), (0, right, 0, bottom), mode="replicate")
    return torch.linalg.vector_norm(difference.flatten(1), dim=1) / difference[0].numel() ** 0.5
