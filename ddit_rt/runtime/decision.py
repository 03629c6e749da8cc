"""The evolution of the latent, from device to host, without holding up the stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops


class PendingEvolution:
    """σ_k of every size for one step, under way.

    The kernel is launched right after the scheduler's step; the host copy travels through pinned memory and is waited for
    only when the next step needs it.

    Args:
        increments: Newest first; see :func:`ddit_rt.ops.latent_evolution`.
        multiples: The sizes, as multiples of ``patch``.
        patch: The model's patch size in latent pixels.
        quantile: ρ.
        packed: Token grid of FLUX's packed layout, or None.
        backend: "auto", "triton" or "torch".
    """

    def __init__(
        self,
        increments: Sequence[torch.Tensor],
        multiples: Sequence[int],
        patch: int,
        quantile: float,
        packed: tuple[int, int] | None,
        backend: str,
    ) -> None:
        self._multiples = tuple(multiples)
        sizes = [k * patch for k in self._multiples]
        result = ops.latent_evolution(increments, sizes, quantile, packed=packed, backend=backend)
        self._event = None
        if result.device.type == "cuda":
            self._host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            self._host.copy_(result, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = result

    def wait(self) -> dict[int, float]:
        """Multiple -> σ_k, the largest over the batch, so that the batch runs at the finest size any sample asks for.

        NaN where any sample's latent is not finite.
        """
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._multiples, self._host.amax(dim=0).tolist()))
