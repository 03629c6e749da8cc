"""Patches on instances: a transformer's ``forward`` and a scheduler's methods, undone without a trace.

Other libraries replace ``forward`` on the instance too (accelerate for CPU offload, diffusers for caches and context
parallel), and accelerate's offload takes every such patch away at the end of each pipeline call. So a patch is
checked at the start of every call and put back on top if it is no longer outermost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Handler = Callable[..., Any]


class MethodPatch:
    """Routes ``owner.name(...)`` through ``handler(inner, *args, **kwargs)``, ``inner`` being what was called before.

    Args:
        owner: The instance to patch; its class is left alone.
        name: Name of the method.
        handler: Receives the previous bound method and the call's arguments.
    """

    def __init__(self, owner: Any, name: str, handler: Handler) -> None:
        self.owner = owner
        self.name = name
        self._handler = handler
        self._link: _Link | None = None

    def ensure_outermost(self) -> None:
        """Installs the patch, or moves it back on top of patches that came later."""
        current = getattr(self.owner, self.name)
        if self._link is not None and current is self._link.patched:
            return
        if self._link is not None:
            self._link.active = False  # whatever still holds the old link passes straight through it
        inner = _beneath(current)
        own = getattr(inner, "__func__", None) is getattr(type(self.owner), self.name, None)
        self._link = _Link(None if own else self.owner.__dict__.get(self.name), inner, self._handler)
        setattr(self.owner, self.name, self._link.patched)

    def remove(self) -> None:
        """Takes the patch out, wherever in the chain it sits."""
        if self._link is not None:
            self._link.active = False
            self.take_out(self.owner.__dict__)
            self._link = None

    def take_out(self, attributes: dict[str, Any]) -> None:
        """Takes the patch out of ``attributes``, the owner's or a copy of them."""
        link = self._link
        if link is None:
            return
        for holder in (self.name, f"_old_{self.name}"):  # accelerate keeps what it wrapped in _old_forward
            if attributes.get(holder) is link.patched:
                if holder == self.name and link.previous is None:
                    del attributes[holder]
                else:
                    attributes[holder] = link.inner


@contextmanager
def installed(patches: Sequence[MethodPatch]) -> Iterator[None]:
    """Puts patches on for the length of a ``with`` block."""
    try:
        for patch in patches:
            patch.ensure_outermost()
        yield
    finally:
        for patch in patches:
            patch.remove()


class _Link:
    """One installed layer; once inactive it only passes through."""

    def __init__(self, previous: Any, inner: Callable[..., Any], handler: Handler) -> None:
        self.previous = previous
        self.inner = inner
        self.active = True

        @functools.wraps(inner)
        def patched(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return self.inner(*args, **kwargs)
            return handler(self.inner, *args, **kwargs)

        patched._ddit_link = self  # type: ignore[attr-defined]
        self.patched = patched


def _beneath(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a function calls, past layers of ours that only pass through: others may have put them back."""
    link = getattr(function, "_ddit_link", None)
    # a wrapper of somebody else's may carry a copy of the attribute
    while link is not None and function is link.patched and not link.active:
        function = link.inner
        link = getattr(function, "_ddit_link", None)
    return function
