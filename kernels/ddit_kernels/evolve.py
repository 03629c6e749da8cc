"""The evolution of the latent by whichever backend can: the decision at once, the quantiles when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ._common import latent_shape, resolve_backend
from .latent_evolution import (
    evolution_select,
    evolution_unsupported,
    latent_evolution_reference,
    patch_counts,
    select_reference,
)
from .patch_quantile import patch_std_quantile


def evolve(
    increments: Sequence[torch.Tensor],
    patch_sizes: Sequence[int],
    quantile: float,
    threshold: float,
    packed: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Decision and quantiles of the same increments, which are read only once. Arguments are not checked here.

    Args:
        increments: n tensors, newest first, each (B, C, H, W), (B, C, F, H, W), or (B, h*w, C*4) with ``packed``.
        patch_sizes: S distinct patch sides in latent pixels.
        quantile: rho.
        threshold: tau.
        packed: Token grid (h, w) of FLUX's packed tokens, or None.
        out: int32 (B,), to receive the decision; on the increments' device or in pinned host memory.
        backend: "auto", "triton" or "torch".

    Returns:
        The decision, int32 (B,): index into (none, *patch_sizes); and how to get the quantiles, float32 (B, S): with
        Triton they are another launch, which not every caller needs. Who calls for them on another stream than this
        one, behind an event of this one, passes that stream: memory that is read there is then not reused before.

    Raises:
        BackendError: ``backend="triton"`` where it cannot run.
    """
    device = increments[0].device
    if resolve_backend(backend, device, evolution_unsupported(increments, patch_sizes, packed)) == "torch":
        known = latent_evolution_reference(increments, patch_sizes, quantile, packed)
        decision = select_reference(known, patch_sizes, threshold)

        def values(stream: torch.cuda.Stream | None = None) -> torch.Tensor:
            if stream is not None:
                known.record_stream(stream)
            return known

        return decision if out is None else out.copy_(decision, non_blocking=True), values
    sizes, grid = list(patch_sizes), None if packed is None else list(packed)
    decision = torch.empty(increments[0].shape[0], dtype=torch.int32, device=device) if out is None else out
    stds = evolution_select(list(increments), sizes, quantile, threshold, grid, decision)
    counts = patch_counts(*latent_shape(increments[0], packed)[2:], sizes)

    def quantiles(stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        if stream is not None:
            stds.record_stream(stream)
        return patch_std_quantile(stds, counts, sizes, quantile)

    return decision, quantiles
