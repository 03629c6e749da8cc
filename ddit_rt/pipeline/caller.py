"""For which pipeline a component works: found on the stack, since its arguments do not say."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

Caller = tuple[Any, int]
"""The innermost diffusers pipeline whose ``__call__`` runs on this thread, and the identity of its frame."""

NOBODY: Caller = (None, 0)
"""No pipeline's call: components that are used directly, or in a loop of the user's own."""


def calling_pipeline() -> Caller:
    """The caller of whoever asks.

    Pipelines share components, fail half-way and are called inside one another's callbacks; a transformer or scheduler
    cannot tell from its arguments for whom it works. The stack can.
    """
    frame = _frame()
    return NOBODY if frame is None else (frame.f_locals["self"], id(frame))


def arguments_of_call() -> dict[str, Any]:
    """The arguments of the pipeline call that runs on this thread, by name, defaults included; empty outside one."""
    frame = _frame()
    if frame is None:
        return {}
    values = frame.f_locals
    return {
        name: values[name]
        for name in inspect.signature(type(values["self"]).__call__).parameters
        if name != "self" and name in values
    }


def local_of_call(name: str) -> Any:
    """What the pipeline call that runs on this thread keeps under a local name; None where there is no such name."""
    frame = _frame()
    return None if frame is None else frame.f_locals.get(name)


def _frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None
