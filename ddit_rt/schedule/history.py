"""The last n increments of the latent, newest first."""

from __future__ import annotations

from collections import deque

import torch


class EvolutionHistory:
    """Keeps as many increments as the finite difference needs.

    An n-th difference of latents takes n increments (n + 1 latents): Δⁿz = Σ (-1)^i C(n-1, i) d_i over increments
    d_0 (newest) to d_{n-1} (paper, equations 2 to 4). A change of shape empties the history.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._increments: deque[torch.Tensor] = deque(maxlen=order)

    def push(self, increment: torch.Tensor) -> None:
        """Adds the newest increment, float32, any shape."""
        if self._increments and self._increments[0].shape != increment.shape:
            self._increments.clear()
        self._increments.appendleft(increment)

    @property
    def full(self) -> bool:
        return len(self._increments) == self.order

    @property
    def increments(self) -> list[torch.Tensor]:
        """Newest first; ``order`` of them once :attr:`full`."""
        return list(self._increments)

    def clear(self) -> None:
        self._increments.clear()
