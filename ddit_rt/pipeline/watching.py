"""Calls that are followed step by step, or run with other settings, without taking any patch on or off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..config import DDiTConfig
from ..errors import ConfigError, DDiTError
from .accelerated_pipeline import AcceleratedPipeline
from .lifecycle import find_accelerated
from .progress import Watcher

POLICY_SETTINGS = frozenset(
    {
        "corrector",
        "costs",
        "initial_full_steps",
        "max_consecutive_coarse",
        "max_consecutive_skipped",
        "order",
        "quality",
        "quantile",
        "reference",
        "schedule",
        "skip_below",
        "speedup",
        "threshold",
        "toward_converged",
    }
)
"""Settings that say when to be coarse, and not how a step is executed."""


@contextmanager
def watched(pipe: Any, watcher: Watcher) -> Iterator[None]:
    """Within the context ``watcher`` hears of every step that ends in a call of this thread.

    It is called inside the pipeline's loop: what it raises ends the call, and the next one begins afresh.

    Args:
        pipe: An accelerated pipeline, or one that shares its components.
        watcher: Takes a :class:`ddit_rt.pipeline.Progress`.

    Raises:
        DDiTError: the pipeline is not accelerated.
    """
    found = _accelerated(pipe)
    kept = found.watcher
    found.watcher = watcher
    try:
        yield
    finally:
        found.watcher = kept


@contextmanager
def configured(pipe: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the context calls choose their steps by other settings; compiled and captured work stays.

    Args:
        pipe: An accelerated pipeline, or one that shares its components.
        settings: Of :data:`POLICY_SETTINGS`; they take the place of the pipeline's own target or schedule.

    Raises:
        ConfigError: another setting, or a value out of range.
        ScheduleError: a schedule that cannot be run.
        DDiTError: the pipeline is not accelerated.
    """
    found = _accelerated(pipe)
    config = settings_of_call(found.config, settings)
    with found.following_settings(config):
        yield


def settings_of_call(config: DDiTConfig, settings: Mapping[str, Any]) -> DDiTConfig:
    """What a call under :func:`configured` runs with, where the pipeline's own settings are ``config``; errors as
    there."""
    for name in settings:
        if name not in POLICY_SETTINGS:
            raise ConfigError(
                f"{name}={settings[name]!r}: one call can change {', '.join(sorted(POLICY_SETTINGS))}; the rest is "
                "accelerate()'s."
            )
    chosen = dict(settings)
    if settings.keys() - {"reference", "toward_converged", "costs", "corrector"}:
        chosen = {**dict.fromkeys(("speedup", "quality", "schedule")), **chosen}
        if chosen["speedup"] is None and chosen["quality"] is None:
            chosen["fit"] = None  # there is no target to fit to
    own_share = config.toward_converged and "toward_converged" not in settings
    if own_share and _leaves_no_way_between(DDiTConfig(**settings)):
        chosen["toward_converged"] = 0.0
    return config.replace(**chosen) if chosen else config


def _leaves_no_way_between(asked: DDiTConfig) -> bool:
    """Whether a call asks for what the pipeline's own share of the way to the converged picture cannot stand beside."""
    return asked.aims_at_converged or asked.quality is not None or not asked.corrector


def _accelerated(pipe: Any) -> AcceleratedPipeline:
    found = find_accelerated(pipe)
    if found is None:
        raise DDiTError(f"this {type(pipe).__name__} is not accelerated: call ddit_rt.accelerate(pipe) first.")
    return found
