"""Names of functions and classes that nobody calls."""

from __future__ import annotations

from enum import Enum
from typing import Any


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"
    BOX = "box"
    HAMMING = "hamming"


def missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("this torchvision is a stand-in")


def named(name: str) -> Any:
    """For a module's ``__getattr__``."""
    if name.startswith("__"):
        raise AttributeError(name)
    return missing
