"""Which pipeline's call is under way on this thread."""

from __future__ import annotations

import sys
from typing import Any

from diffusers import DiffusionPipeline

NOBODY = (None, 0)
"""No pipeline's call: components that are used directly, or in a loop of the user's own."""


def calling_pipeline() -> tuple[Any, int]:
    """The innermost diffusers pipeline whose ``__call__`` runs on this thread, and the identity of its frame.

    Pipelines share components, fail half-way and are called inside one another's callbacks; a transformer or scheduler
    cannot tell from its arguments for whom it works. The stack can.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                return owner, id(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return NOBODY


class CallBar:
    """A pipeline's progress bar that tells when it is moved on, and when its ``with`` block ends, however it ends.

    Args:
        bar: The pipeline's own.
        on_update: Called after every update.
        on_end: Called at the end.
    """

    def __init__(self, bar: Any, on_update: Any, on_end: Any) -> None:
        self._bar, self._on_update, self._on_end = bar, on_update, on_end

    def __enter__(self) -> CallBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        try:
            return self._bar.__exit__(*error)
        finally:
            self._on_end()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Moves the bar on."""
        result = self._bar.update(*args, **kwargs)
        self._on_update()
        return result

    def __iter__(self) -> Any:
        return iter(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
