"""Other libraries' accelerations, each put on a plain pipeline for as long as it is measured."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ...errors import ConfigError
from ...families import denoisers, family_of

INSTALL = "pip install 'ddit-rt[peers]'"

Cached = Callable[[], float | None]
"""Steps that the last call took from a cache, where the peer says so; None where it does not."""


@dataclass(frozen=True)
class Peer:
    """What an evaluation has to know of another library.

    Attributes:
        module: What is imported.
        title: Its name for people.
        check: Raises TypeError for options that it does not take.
        enabled: (pipe, options, call) -> a context with the peer on ``pipe``.
    """

    module: str
    title: str
    check: Callable[[Mapping[str, Any]], Any]
    enabled: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], AbstractContextManager[Cached]]


def is_installed(kind: str) -> bool:
    """Whether a peer can be imported.

    Args:
        kind: Of :data:`PEERS`.
    """
    return _import_error(kind) is None


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Looks at a method's settings, without the peer itself, so that results can be read where it is missing.

    Args:
        name: The method's, for errors.
        settings: ``{"peer": {"type": ..., option: value, ...}}``.

    Raises:
        ConfigError: other settings beside ``peer``, or a peer that is none of :data:`PEERS`.
    """
    beside = sorted(set(settings) - {"peer"})
    if beside:
        raise ConfigError(f"{name}: a peer runs on the plain pipeline, take away {', '.join(beside)}.")
    kind = settings["peer"].get("type") if isinstance(settings["peer"], Mapping) else settings["peer"]
    if kind not in PEERS:
        raise ConfigError(f"{name}: peer type {kind!r} is none of {', '.join(PEERS)}.")


def require(name: str, peer: Mapping[str, Any]) -> None:
    """Makes sure that a peer can run.

    Args:
        name: The method's, for errors.
        peer: ``{"type": ..., option: value, ...}``.

    Raises:
        ConfigError: its library is not installed (names the extra that brings it), or takes no such options.
    """
    kind, options = _split(peer)
    error = _import_error(kind)
    if error is not None:
        raise ConfigError(f"{name} needs {PEERS[kind].title}, which cannot be imported ({error}): {INSTALL}")
    try:
        PEERS[kind].check(options)
    except TypeError as wrong:
        raise ConfigError(f"{name}: {PEERS[kind].title} refuses its options: {wrong}.") from None


@contextmanager
def peer_enabled(pipe: Any, peer: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[Cached]:
    """A peer on a plain pipeline for the length of a ``with`` block; afterwards the pipeline is plain bit for bit.

    Its state begins anew with every call of the pipeline. Count FLOP within the block: a peer may replace the
    transformer's ``forward``.

    Args:
        pipe: A plain pipeline. Other pipelines of its class should not run meanwhile: peers also patch classes.
        peer: ``{"type": ..., option: value, ...}``.
        call: Arguments that the pipeline is going to be called with.

    Yields:
        What gives the steps that the last call took from the cache.

    Raises:
        ConfigError: the peer is not installed, or its options do not fit.
    """
    kind, options = _split(peer)
    require(kind, peer)
    kept = _Kept(pipe)
    try:
        with PEERS[kind].enabled(pipe, options, call) as cached:
            yield cached
    finally:
        kept.put_back()


def block_count(pipe: Any) -> int:
    """Transformer blocks of a pipeline's denoiser, of the smaller one where it has two."""
    modules = [unwrap_module(module) for module in denoisers(pipe, family_of(pipe)).values()]
    return min(sum(len(child) for child in m.children() if isinstance(child, nn.ModuleList)) for m in modules)


def runs_twice(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Whether every step of a call runs the transformer once for the prompt and once for the negative prompt."""
    defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
    given = {**defaults, **call}
    if "true_cfg_scale" not in given:
        return given["guidance_scale"] > 1
    negative = any(given.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    return negative and given["true_cfg_scale"] > 1


def _split(peer: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return peer["type"], {name: value for name, value in peer.items() if name != "type"}


def _import_error(kind: str) -> ImportError | None:
    try:
        importlib.import_module(PEERS[kind].module)
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


def _dbcache_config(options: Mapping[str, Any]) -> Any:
    return importlib.import_module("cache_dit").DBCacheConfig(**options)


@contextmanager
def _dbcache(pipe: Any, options: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[Cached]:
    cache_dit = importlib.import_module("cache_dit")
    # its own default goes by the pipeline's class, not by whether this call has a negative prompt
    config = _dbcache_config({"enable_separate_cfg": runs_twice(pipe, call), **options})
    blocks = block_count(pipe)
    if config.Fn_compute_blocks + config.Bn_compute_blocks >= blocks:
        raise ConfigError(
            f"Fn_compute_blocks={config.Fn_compute_blocks} and Bn_compute_blocks={config.Bn_compute_blocks} leave "
            f"nothing to skip of {blocks} blocks."
        )
    modules = list(denoisers(pipe, family_of(pipe)).values())

    def cached() -> float | None:
        steps = 0.0
        for module in modules:
            stats = cache_dit.summary(module, logging=False)[-1]
            branches = [stats.cached_steps, stats.cfg_cached_steps][: 2 if config.enable_separate_cfg else 1]
            steps += sum(map(len, branches)) / len(branches)
        return steps

    with _quiet("cache_dit"):
        try:
            cache_dit.enable_cache(pipe, cache_config=config)
            yield cached
        finally:
            cache_dit.disable_cache(pipe)


@contextmanager
def _quiet(package: str) -> Iterator[None]:
    """Keeps a package from logging anything below errors, as every switch would into the progress bar."""
    known = logging.root.manager.loggerDict.items()
    loggers = [log for name, log in known if name.split(".")[0] == package and isinstance(log, logging.Logger)]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        yield
    finally:
        for log, level in zip(loggers, levels):
            log.setLevel(level)


PEERS: dict[str, Peer] = {"dbcache": Peer("cache_dit", "cache-dit", _dbcache_config, _dbcache)}
"""Peers by the type that a method's settings name."""
