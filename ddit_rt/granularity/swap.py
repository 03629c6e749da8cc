"""Runs a module with some of the forwards inside it exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def swapped(module: nn.Module, **forwards: Callable[..., Any]) -> Iterator[None]:
    """Within the context, submodule ``name`` of ``module`` computes ``forwards[name]``; afterwards all is as it was.

    Names may be dotted paths. Only instances are touched, so contexts nest, and whatever else wraps a forward
    (offloading, a user's LoRA) stays in place.
    """
    children = {name: module.get_submodule(name) for name in forwards}
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
