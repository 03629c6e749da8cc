"""Settings of an engine's plug-in: ``DDIT_*`` environment variables, a file, and what a request asks for itself.

``DDIT_CONFIG`` names a YAML or JSON file of :class:`ddit_rt.DDiTConfig`; ``DDIT_<FIELD>`` sets one field over it, as in
``DDIT_SPEEDUP=2.5``, ``DDIT_MULTIPLES=1,2`` or ``DDIT_SCHEDULE=schedule.json``; ``DDIT_ADAPTER`` is a trained adapter.
``DDIT_SPEEDUP=1`` is the plain pipeline, for servers where only requests ask for more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import DDiTConfig
from ..errors import ConfigError, DDiTError
from ..settings import JSON_ENDING, parse_yaml, shown

PREFIX = "DDIT_"
# of this package, and not settings of a pipeline: DDIT_RT_CACHE and the like; the kernels read DDIT_BACKEND themselves
_OTHER = re.compile(r"DDIT_RT_.*|DDIT_BACKEND")
_NUMBERS = re.compile(r"\s*\d+\s*(,\s*\d+\s*)*")
_DECIDING = ("speedup", "quality", "schedule")


@dataclass(frozen=True)
class PluginSettings:
    """What a plug-in passes to :func:`ddit_rt.accelerate`.

    Attributes:
        config: Settings.
        adapter: Path or hub id of a trained adapter, or None.
    """

    config: DDiTConfig
    adapter: str | None = None

    def replace(self, changes: Mapping[str, Any]) -> PluginSettings:
        """These settings with others in their place; a target or schedule among them takes the place of the old one.

        Args:
            changes: Fields of :class:`ddit_rt.DDiTConfig`, and ``adapter``.

        Raises:
            ConfigError: an unknown name, a value out of range, or a fit, which no engine waits for.
            ScheduleError: a schedule that cannot be run.
        """
        chosen = dict(changes)
        adapter = chosen.pop("adapter", self.adapter)
        if not (adapter is None or isinstance(adapter, str)):
            raise ConfigError(f"adapter={shown(adapter)}: the path of an adapter, or its hub id.")
        config = self.config.replace(**_deciding_alone(chosen))
        if config.fit is not None:
            raise ConfigError(
                f"fit={config.fit!r} would keep requests waiting: run `ddit-rt fit` before, and leave it out."
            )
        return PluginSettings(config, adapter)


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> PluginSettings | None:
    """What the environment asks for; None where it asks for nothing.

    Raises:
        ConfigError: a variable that is no setting, or a value out of range; the message has the variable's name.
        ScheduleError: the same of the schedule's entries.
    """
    given = {
        name.removeprefix(PREFIX).lower(): value.strip()
        for name, value in environment.items()
        if name.startswith(PREFIX) and not _OTHER.fullmatch(name) and value.strip()
    }
    if not given:
        return None
    path, adapter = given.pop("config", None), given.pop("adapter", None)
    for name in given:
        if name not in DDiTConfig.model_fields:
            known = ", ".join(sorted(f"{PREFIX}{field.upper()}" for field in DDiTConfig.model_fields))
            raise ConfigError(
                f"{PREFIX}{name.upper()} is no setting: there are {PREFIX}CONFIG, {PREFIX}ADAPTER, {known}."
            )
    try:
        base = DDiTConfig() if path is None else DDiTConfig.load(path)
    except DDiTError as error:
        raise type(error)(f"{PREFIX}CONFIG: {error}") from None
    try:
        changes = {name: _value_of(name, text) for name, text in given.items()}
        return PluginSettings(base, adapter).replace(changes)
    except DDiTError as error:
        names = ", ".join(f"{PREFIX}{name.upper()}" for name in (*given, *([] if path is None else ["config"])))
        raise type(error)(f"{names}: {error}") from None


def request_settings(given: Any, config: DDiTConfig) -> tuple[dict[str, Any], DDiTConfig]:
    """The settings of one request, checked without a pipeline.

    Args:
        given: What came with the request: a mapping of the settings that say when to be coarse. ``speedup`` may be 1,
            for the plain pipeline. ``schedule`` is a list: a file would be one of the server's.
        config: The server's own, in whose place or beside which they stand.

    Returns:
        The settings as :func:`ddit_rt.pipeline.configured` takes them, and what the request then runs with.

    Raises:
        ConfigError: no mapping, an unknown or another setting, or a value out of range.
        ScheduleError: the same of the schedule's entries.
    """
    # imports torch, which a plug-in's registration does not need
    from ..pipeline import POLICY_SETTINGS, settings_of_call

    if not isinstance(given, Mapping):
        raise ConfigError(f"ddit={shown(given)}: give an object, as in {{'speedup': 2.5}}.")
    for name in given:
        if name not in POLICY_SETTINGS:
            raise ConfigError(f"ddit: {shown(name)} is no setting of a request: {', '.join(sorted(POLICY_SETTINGS))}.")
    schedule = given.get("schedule")
    if not (schedule is None or isinstance(schedule, list | tuple)):
        raise ConfigError(f"ddit: schedule={shown(schedule)}: a list of one multiple per step, as in [1, 1, 0, 2].")
    chosen = _without_speedup_of_one(given)
    try:
        return chosen, settings_of_call(config, chosen)
    except DDiTError as error:
        raise type(error)(f"ddit: {error}") from None


def _without_speedup_of_one(values: Mapping[str, Any]) -> dict[str, Any]:
    chosen = dict(values)
    if chosen.get("speedup") == 1 and not isinstance(chosen["speedup"], bool):
        del chosen["speedup"]
        chosen["threshold"] = 0.0
    return chosen


def _deciding_alone(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that take the place of an older target, where one of them says when to be coarse."""
    chosen = _without_speedup_of_one(changes)
    if chosen.keys() & {*_DECIDING, "threshold"}:
        chosen = {**dict.fromkeys(_DECIDING), **chosen}
    return chosen


def _value_of(name: str, text: str) -> Any:
    if name == "schedule" and text.endswith(JSON_ENDING):
        return text
    if name in ("schedule", "multiples") and _NUMBERS.fullmatch(text):
        return [int(part) for part in text.split(",")]
    return parse_yaml(text, PREFIX + name.upper())
