"""Runs a module with some of its children's forwards exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def swapped(module: nn.Module, **forwards: Callable[..., Any]) -> Iterator[None]:
    """Within the context, child ``name`` of ``module`` computes ``forwards[name]``; afterwards all is as it was."""
    children = {name: getattr(module, name) for name in forwards}
    before = {name: child.__dict__.get("forward") for name, child in children.items()}
    try:
        for name, child in children.items():
            child.forward = forwards[name]
        yield
    finally:
        for name, child in children.items():
            original = before[name]
            if original is None:
                child.__dict__.pop("forward", None)
            else:
                child.forward = original
