"""Which of several computations of the same result is the fastest for a problem, found by measuring each of them once.

A fused kernel saves launches and traffic, but gathers its operand itself: where cuBLAS on a copied operand is faster,
that is to be taken. Nobody knows beforehand on which card and for which shape.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping

import torch

logger = logging.getLogger(__name__)

Bench = Callable[[Callable[[], object]], float]
"""Milliseconds that a function takes."""


class Contest:
    """Remembers who won, for as long as the process lives.

    Args:
        bench: How a candidate is measured; None takes Triton's ``do_bench``, the median of about 20 ms.
    """

    def __init__(self, bench: Bench | None = None) -> None:
        self._bench = bench or _median
        self._winners: dict[Hashable, str] = {}
        self._lock = threading.Lock()

    def winner(self, key: Hashable, candidates: Mapping[str, Callable[[], object]], measurable: bool = True) -> str:
        """Name of the fastest candidate, the first of equals.

        Args:
            key: Of the problem: shapes, strides, dtypes, device, options.
            candidates: Name -> computation; each is called several times unless the winner is known.
            measurable: Whether a measurement is possible now. If not, and the winner is unknown, it is the first, for
                this time.
        """
        with self._lock:
            known = self._winners.get(key)
            if known is not None:
                return known
            if not measurable:
                return next(iter(candidates))
            times = {name: self._bench(candidate) for name, candidate in candidates.items()}
            known = self._winners[key] = min(times, key=times.__getitem__)
            logger.debug("%s: %s", key, ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items()))
            return known

    def results(self) -> dict[Hashable, str]:
        """Problem -> winner, of all that were measured."""
        with self._lock:
            return dict(self._winners)


def measurable(device: torch.device) -> bool:
    """Whether something can be timed on ``device`` now: not while a graph is captured."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def signature(*tensors: torch.Tensor | float | None) -> tuple[Hashable, ...]:
    """What of the arguments decides how long a computation takes."""
    return tuple(
        (one.shape, one.stride(), one.dtype, one.device) if isinstance(one, torch.Tensor) else one is None
        for one in tensors
    )


def _median(candidate: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(candidate, warmup=5, rep=20, return_mode="median"))
