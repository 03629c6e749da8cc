"""For which pipeline a component works: found on the stack, since its arguments do not say."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

Caller = tuple[Any, int]
"""The innermost diffusers pipeline, modular or not, whose ``__call__`` runs on this thread, and the identity of its
frame."""

NOBODY: Caller = (None, 0)
"""No pipeline's call: components that are used directly, or in a loop of the user's own."""


def is_pipeline(found: Any) -> bool:
    """Whether something is a pipeline of diffusers, an ordinary one or, where somebody has imported them, a modular."""
    return isinstance(found, DiffusionPipeline) or is_modular(found)


def is_modular(found: Any) -> bool:
    """Whether something is a modular pipeline, whose call is that of its blocks."""
    modular = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")
    return modular is not None and isinstance(found, modular.ModularPipeline)


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
    if not isinstance(values["self"], DiffusionPipeline):
        return _state_of_blocks(values["state"])
    # the frame's own names: a subclass may pass on what it is given without naming it
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {name: values[name] for name in names if name != "self" and name in values}


def local_of_call(name: str) -> Any:
    """What the pipeline call that runs on this thread keeps under a local name; None where there is no such name."""
    frame = _frame()
    return None if frame is None else frame.f_locals.get(name)


def _state_of_blocks(state: Any) -> dict[str, Any]:
    """What the blocks of a modular pipeline's call work with.

    Its state holds the defaults of all blocks, those of other workflows, too. ``strength``, which by being there says
    that a part of the steps runs, is left out unless the block at work takes it.
    """
    frame: FrameType | None = sys._getframe(2)
    # a block's call is told the state, and keeps the pipeline as `components`
    while frame is not None and not (frame.f_code.co_name == "__call__" and "components" in frame.f_locals):
        frame = frame.f_back
    inputs = () if frame is None else frame.f_locals["self"].inputs
    found = {name: value for name, value in state.values.items() if value is not None}
    if "strength" not in {entry.name for entry in inputs}:
        found.pop("strength", None)
    return found


def _frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and is_pipeline(frame.f_locals.get("self")):
            return frame
        frame = frame.f_back
    return None
