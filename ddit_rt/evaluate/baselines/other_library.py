"""Other libraries as baselines: each is put on a plain pipeline for as long as it is measured."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from ...errors import ConfigError
from ...families import denoisers, family_of
from .base import Baseline

Cached = Callable[[], float | None]
"""Steps that the last call took from a cache, where the library says so; None where it does not."""


class Library(Baseline):
    """Another package's acceleration: ``{"library": {"type": name, option: value, ...}}``, nothing beside it.

    Attributes:
        module: What is imported.
        title: The package's name for people.
        install: The command that brings it.
    """

    module: ClassVar[str]
    title: ClassVar[str]
    install: ClassVar[str] = "pip install 'ddit-rt[baselines]'"

    @property
    def missing(self) -> str | None:
        error = self._import_error()
        return None if error is None else f"needs {self.title}, which cannot be imported ({error}): {self.install}"

    @abstractmethod
    def check(self, where: str, options: Mapping[str, Any]) -> None:
        """Looks at options without the library itself, so that results can be read where it is missing.

        Args:
            where: Name of the method, for errors.
            options: Without the type.

        Raises:
            ConfigError: an option is out of range.
        """

    @abstractmethod
    def check_with_library(self, options: Mapping[str, Any]) -> None:
        """Looks at options with the library.

        Raises:
            TypeError: the library takes no such option.
        """

    @abstractmethod
    def put_on(self, pipe: Any, options: Mapping[str, Any], call: Mapping[str, Any]) -> AbstractContextManager[Cached]:
        """A context with the library on ``pipe``. What it leaves behind is cleared away by :meth:`enabled`.

        Args:
            pipe: A plain pipeline.
            options: Without the type.
            call: Arguments that the pipeline is going to be called with.

        Raises:
            ConfigError: the options do not fit the pipeline.
        """

    def require(self, where: str, options: Mapping[str, Any]) -> None:
        """Makes sure that the library can run with these options.

        Args:
            where: Name of the method, for errors.
            options: Without the type.

        Raises:
            ConfigError: an option is out of range, the library is not installed (says what installs it), or it takes no
                such options.
        """
        self.check(where, options)
        if (missing := self.missing) is not None:
            raise ConfigError(f"{where} {missing}")
        try:
            self.check_with_library(options)
        except TypeError as error:
            raise ConfigError(f"{where}: {self.title} refuses its options: {error}.") from None

    @contextmanager
    def enabled(self, pipe: Any, options: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[Cached]:
        """The library on a plain pipeline for the length of a ``with`` block; afterwards it is plain bit for bit.

        Its state begins anew with every call of the pipeline. Count FLOP within the block: a library may replace the
        transformer's ``forward``.

        Args:
            pipe: A plain pipeline. No other of its class should run meanwhile: libraries also patch classes.
            options: Without the type.
            call: Arguments that the pipeline is going to be called with.

        Yields:
            What gives the steps that the last call took from the cache.

        Raises:
            ConfigError: the library is not installed, or its options do not fit.
        """
        self.require(self.name, options)
        kept = _Kept(pipe)
        try:
            with self.put_on(pipe, options, call) as cached:
                yield cached
        finally:
            kept.put_back()

    def _import_error(self) -> ImportError | None:
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return error
        return None


class _Kept:
    """Attributes of a pipeline's class and of all parts of its denoisers, to be put back.

    cache-dit's own way back leaves FLUX with cache-dit's ``forward``, and the block lists behind the other children.
    """

    def __init__(self, pipe: Any) -> None:
        self._class = type(pipe)
        self._class_attributes = dict(vars(self._class))
        modules = [m for denoiser in denoisers(pipe, family_of(pipe)).values() for m in denoiser.modules()]
        self._attributes = [(module, dict(vars(module)), dict(module._modules)) for module in modules]

    def put_back(self) -> None:
        for name in set(vars(self._class)) - set(self._class_attributes):
            delattr(self._class, name)
        for name, value in self._class_attributes.items():
            if vars(self._class).get(name) is not value:
                setattr(self._class, name, value)
        for module, attributes, children in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
