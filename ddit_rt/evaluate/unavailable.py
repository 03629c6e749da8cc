"""Metrics that cannot be had here: the evaluation goes on without them and says why."""

from __future__ import annotations

from ..errors import DDiTError


class MetricUnavailableError(DDiTError):
    """A metric's package or weights are not to be had here; the text says which and how to get them."""


def unavailable(metric: str, needs: str, error: Exception, weights: bool = True) -> MetricUnavailableError:
    """The error for a metric that cannot be loaded.

    Args:
        metric: Its name.
        needs: What it needs.
        error: What loading it gave.
        weights: Whether weights have to come from the net once.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    connection = ", and a connection once" if weights else ""
    return MetricUnavailableError(
        f"{metric} needs {needs} (pip install 'ddit-rt[eval]'{connection}): {type(error).__name__}: {reason}"
    )
