"""The evolution of the latent, from device to host, without holding up the stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops


class HostResults:
    """Page-locked memory that the device writes its results to, and the events that say when; reused from step to step.

    Args:
        batch: Samples.
        sizes: Patch sizes.
    """

    def __init__(self, batch: int, sizes: int) -> None:
        self.decision = torch.empty(batch, dtype=torch.int32, pin_memory=True)
        self.quantiles = torch.empty(batch, sizes, dtype=torch.float32, pin_memory=True)
        self.decided = torch.cuda.Event()
        self.measured = torch.cuda.Event()


class PendingEvolution:
    """The decision for one step and the σ_k it rests on, under way.

    The kernel is launched right after the scheduler's step and writes its decision straight to page-locked memory. The
    host waits for it only when the next step begins, and for the σ_k, which take longer, only when somebody reads them.

    Args:
        increments: Newest first; see :func:`ddit_rt.ops.latent_evolution`.
        multiples: The sizes, as multiples of ``patch``, ascending.
        patch: The model's patch size in latent pixels.
        quantile: ρ.
        packed: Token grid of FLUX's packed layout, or None.
        backend: "auto", "triton" or "torch".
        threshold: τ.
        host: Where results on CUDA go; whatever was launched into it before has to be read by now. None makes its own.
    """

    def __init__(
        self,
        increments: Sequence[torch.Tensor],
        multiples: Sequence[int],
        patch: int,
        quantile: float,
        packed: tuple[int, int] | None,
        backend: str,
        threshold: float = 0.0,
        host: HostResults | None = None,
    ) -> None:
        self._multiples = tuple(multiples)
        self._patch_std: dict[int, float] | None = None
        sizes = [k * patch for k in self._multiples]
        on_device = increments[0].is_cuda
        if on_device and host is None:
            host = HostResults(increments[0].shape[0], len(sizes))
        self._host = host if on_device else None
        self._decision, self._quantiles = ops.evolve_and_select(
            increments,
            sizes,
            quantile,
            threshold,
            packed=packed,
            out=None if self._host is None else self._host.decision,
            decided=None if self._host is None else self._host.decided,
            backend=backend,
        )
        if self._host is not None:
            self._quantiles = self._host.quantiles.copy_(self._quantiles, non_blocking=True)
            self._host.measured.record()

    def decision(self) -> int:
        """The coarsest multiple whose σ_k is below τ, else 1: the finest that any sample of the batch asks for.

        A sample whose latent is not finite asks for 1.
        """
        if self._host is not None:
            self._host.decided.synchronize()
        return min((1, *self._multiples)[index] for index in self._decision.tolist())

    def wait(self) -> dict[int, float]:
        """Multiple -> σ_k, the largest over the batch; NaN where any sample's latent is not finite."""
        if self._patch_std is None:
            if self._host is not None:
                self._host.measured.synchronize()
            self._patch_std = dict(zip(self._multiples, self._quantiles.amax(dim=0).tolist()))
        return self._patch_std
