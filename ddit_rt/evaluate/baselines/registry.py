"""The baselines, and those of them that a method's settings name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ...errors import ConfigError
from .base import Baseline, StepCache
from .dbcache import DBCache
from .dpmsolver import DPMSolver
from .euler import Euler
from .extrapolation import Extrapolation
from .fewer_steps import FewerSteps
from .first_block import FirstBlock
from .fixed_spacing import FixedSpacing
from .heun import Heun
from .magcache import MagCache
from .other_library import Library
from .solver import OtherSolver
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .unipc import UniPC

BASELINES: list[Baseline] = [
    FewerSteps(),
    Euler(),
    Heun(),
    DPMSolver(),
    UniPC(),
    Extrapolation(),
    FixedSpacing(),
    TeaCache(),
    FirstBlock(),
    TaylorSeer(),
    MagCache(),
    DBCache(),
]
"""All baselines, in the order that an evaluation lists them."""

Named = TypeVar("Named", StepCache, Library, OtherSolver)


def find_cache(where: str, setting: Mapping[str, Any]) -> tuple[StepCache, dict[str, Any]]:
    """The step cache that ``{"type": name, option: value, ...}`` names, and its options.

    Args:
        where: Name of the method, for errors.
        setting: A method's ``cache``.

    Raises:
        ConfigError: no step cache has this name.
    """
    return _find(StepCache, "cache", where, setting)  # type: ignore[type-abstract]


def find_library(where: str, setting: Any) -> tuple[Library, dict[str, Any]]:
    """The library that ``{"type": name, option: value, ...}`` names, and its options.

    Args:
        where: Name of the method, for errors.
        setting: A method's ``library``.

    Raises:
        ConfigError: no library has this name.
    """
    return _find(Library, "library", where, setting)  # type: ignore[type-abstract]


def find_solver(where: str, setting: Any) -> tuple[OtherSolver, dict[str, Any]]:
    """The solver that ``{"type": name, option: value, ...}`` names, and its options.

    Args:
        where: Name of the method, for errors.
        setting: A method's ``solver``.

    Raises:
        ConfigError: no solver has this name.
    """
    return _find(OtherSolver, "solver", where, setting)


def _find(base: type[Named], what: str, where: str, setting: Any) -> tuple[Named, dict[str, Any]]:
    """What a setting names among the baselines of a kind; one that is no mapping can be nothing but a name."""
    known = {baseline.name: baseline for baseline in BASELINES if isinstance(baseline, base)}
    options = dict(setting) if isinstance(setting, Mapping) else {"type": setting}
    name = options.pop("type", None)
    if name not in known:
        raise ConfigError(f"{where}: {what} type {name!r} is none of {', '.join(known)}.")
    return known[name], options
