"""The coarse paths by name. A new path is one file here, or anywhere, that registers itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ..adapter.model import Adapter
from .base import CoarsePath


@dataclass(frozen=True)
class PathOptions:
    """The settings that paths are made from; see :class:`ddit_rt.DDiTConfig`.

    Attributes:
        residual: ``"linear"`` or ``"constant"``.
        high_band: ``"line"`` or ``"clean"``.
        adapter: A trained adapter, or None.
        name: Of the path that is made.
    """

    residual: str = "linear"
    high_band: str = "line"
    adapter: Adapter | None = None
    name: str = ""

    def require_adapter(self) -> Adapter:
        """The adapter.

        Raises:
            ConfigError: there is none.
        """
        if self.adapter is None:
            raise ConfigError(f"coarse={self.name!r} needs adapter=...: pass an adapter, or coarse='delta'.")
        return self.adapter


_MAKERS: dict[str, Callable[[PathOptions], CoarsePath]] = {}


def register_path(name: str) -> Callable[[Callable[[PathOptions], CoarsePath]], Callable[[PathOptions], CoarsePath]]:
    """Makes a function (options) -> path known as ``DDiTConfig.coarse=name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(maker: Callable[[PathOptions], CoarsePath]) -> Callable[[PathOptions], CoarsePath]:
        if name in _MAKERS or name == "auto":
            raise ValueError(f"there is a coarse path {name!r} already.")
        _MAKERS[name] = maker
        return maker

    return register


def path_names() -> tuple[str, ...]:
    """Names of all paths."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return tuple(_MAKERS)


def default_path(has_adapter: bool) -> str:
    """The path that ``coarse="auto"`` stands for."""
    return "adapter" if has_adapter else "delta"


def make_path(name: str, options: PathOptions) -> CoarsePath:
    """The path of a name other than ``"auto"``.

    Raises:
        ConfigError: there is no such path, or it needs an adapter and there is none.
    """
    if name not in path_names():
        raise ConfigError(f"coarse={name!r}: use one of {', '.join(map(repr, ('auto', *path_names())))}.")
    return _MAKERS[name](PathOptions(options.residual, options.high_band, options.adapter, name))
