"""Settings of methods: read from files, checked, and turned into what a run takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import DDiTConfig
from ..errors import ConfigError
from ..schedule import FittedSchedule, TargetPolicy
from .baselines import find_cache, find_library, find_solver
from .methods import Method


def run_settings(method: Method) -> dict[str, Any] | None:
    """A method's settings for :func:`~ddit_rt.evaluate.measurement.generate`, with the step cache's config made.

    Raises:
        ConfigError: an unknown step cache or library, an option that it does not have or a value out of range, or
            further settings beside ``library`` or ``solver``.
    """
    if method.settings is None:
        return None
    settings = dict(method.settings)
    for alone, what in (("library", "another library"), ("solver", "another solver")):
        beside = sorted(set(settings) - {alone})
        if alone in settings and beside:
            raise ConfigError(f"{method.name}: {what} runs on the plain pipeline, take away {', '.join(beside)}.")
    if "target" in settings:
        # the rule itself: not a schedule that this machine's user has fitted
        settings["schedule"] = _target(method.name, settings.pop("target"))
    if "fitted" in settings:
        settings["schedule"] = _fitted(method.name, settings.pop("fitted"))
    if "solver" in settings:
        solver, options = find_solver(method.name, settings["solver"])
        solver.check(method.name, options)
    elif "library" in settings:
        library, options = find_library(method.name, settings["library"])
        library.check(method.name, options)
    elif isinstance(settings.get("cache"), Mapping):
        cache, options = find_cache(method.name, settings["cache"])
        settings["cache"] = cache.config(method.name, options)
    return settings


def _target(name: str, options: Any) -> TargetPolicy:
    known = {"speedup", "reference"}
    if not isinstance(options, Mapping) or not {"speedup"} <= set(options) <= known:
        raise ConfigError(f'{name}: target={options!r}: write {{"speedup": 2, "reference": "plain"}}.')
    config = DDiTConfig(**options)
    return TargetPolicy(config.speedup, config.reference)


def _fitted(name: str, fields: Any) -> FittedSchedule:
    try:
        return FittedSchedule(**fields)
    except TypeError as error:
        raise ConfigError(f"{name}: fitted holds the fields of a schedule file ({error}).") from None


def read_methods(path: str | Path) -> list[Method]:
    """Methods from a JSON file: a list of the fields of :class:`Method`.

    Raises:
        ConfigError: the file is missing or no JSON, or an entry lacks a field or has one too many.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return check_methods([Method(**entry) for entry in entries])
    except FileNotFoundError:
        raise ConfigError(f"methods={str(path)!r}: there is no such file.") from None
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"methods={str(path)!r}: {error}.") from None


def check_methods(methods: Sequence[Method]) -> list[Method]:
    """Every name once, a plain reference run for every method, and settings in order.

    Raises:
        ConfigError: names the offending method.
    """
    names = [method.name for method in methods]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ConfigError(f"method names have to be unique: {', '.join(sorted(doubled))}.")
    references = {method.steps for method in methods if method.is_reference}
    for method in methods:
        if method.reference not in references:
            raise ConfigError(f"{method.name} is compared with {method.reference} plain steps, which no method runs.")
        run_settings(method)
    return list(methods)
