"""Copies and pickles of patched components are plain: they hold nothing of the accelerated pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime import MethodPatch

_MARK = "_ddit_pipeline"
_STATE = "__getstate__"


def keep_plain(owner: Any, accelerated: Any, patches: Sequence[MethodPatch]) -> None:
    """Marks a component as belonging to an accelerated pipeline, and makes its copies plain.

    ``copy.copy``, ``copy.deepcopy``, ``pickle`` and ``torch.save`` ask an instance for its state. Left alone they would
    copy the patched methods too, through which the copy would drive the original.

    Args:
        owner: A transformer, scheduler or pipeline.
        accelerated: The accelerated pipeline.
        patches: On methods of ``owner``.
    """
    own_state = getattr(owner, _STATE)

    def state() -> Any:
        found = own_state()
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if name not in (_MARK, _STATE)}
            for patch in patches:
                patch.take_out(found)
        return found

    owner.__dict__[_MARK] = accelerated
    owner.__dict__[_STATE] = state


def release_plain(owner: Any) -> None:
    """Undoes :func:`keep_plain`."""
    owner.__dict__.pop(_MARK, None)
    owner.__dict__.pop(_STATE, None)


def accelerated_by(owner: Any) -> Any:
    """The accelerated pipeline that a component belongs to; None for any other object."""
    return getattr(owner, "__dict__", {}).get(_MARK)
