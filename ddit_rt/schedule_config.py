"""What ``multiples=`` and ``schedule=`` may be, and the check of what they are given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo

from .errors import ConfigError, ScheduleError
from .multiples import ALL_MULTIPLES, SKIP, SUPPORTED_MULTIPLES, TEMPORAL_MULTIPLES, read_multiple, volume
from .settings import JSON_ENDING, is_whole, read_json, shown

ScheduleFn = Callable[[int, Mapping[int, float]], int]

SCHEDULE_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"enum": [SKIP, *ALL_MULTIPLES]}},
        {"type": "string", "pattern": r"\.json$"},
        {"type": "null"},
    ]
}


def checked_multiples(multiples: Any) -> tuple[int, ...]:
    values = tuple(map(read_multiple, multiples)) if isinstance(multiples, Iterable) else ()
    known = all(is_whole(k) and k in ALL_MULTIPLES for k in values)
    if not known or 1 not in values or len(set(values)) < len(values):
        raise ConfigError(
            f"multiples={shown(multiples)}: take distinct values from {SUPPORTED_MULTIPLES}, 1 among them; for video "
            "also (2, 1) and (2, 2), which span two latent frames."
        )
    return tuple(sorted((int(k) for k in values), key=volume))


def checked_schedule(schedule: Any, info: ValidationInfo) -> tuple[int, ...] | ScheduleFn | None:
    if callable(getattr(schedule, "tolist", None)):  # an array, whose `choose` is no policy's
        schedule = _values_of(schedule)
    if callable(getattr(schedule, "choose", None)) and not callable(getattr(schedule, "start", None)):
        raise ScheduleError(
            f"schedule={shown(schedule)}: a policy has start(steps) and choose(step), this one no start."
        )
    if schedule is None or callable(schedule) or hasattr(schedule, "choose"):
        return schedule
    multiples = info.data.get("multiples", SUPPORTED_MULTIPLES)
    if isinstance(schedule, Path) or (isinstance(schedule, str) and schedule.endswith(JSON_ENDING)):
        path = Path(schedule)
        values = read_json(path, "schedule")
        if not isinstance(values, dict) or "schedule" not in values:
            raise ConfigError(
                f"schedule={str(path)!r} is not what `ddit-rt fit` writes: it has no entry 'schedule'. Write "
                '{"schedule": [1, 1, 2, ...]}.'
            )
        if values.get("reference", "plain") != "plain":  # it has noise levels of its own, which a tuple cannot hold
            return importlib.import_module("ddit_rt.schedule").FittedSchedule.load(path)
        return _multiple_per_step(values["schedule"], multiples, f"{path}: ")
    return _multiple_per_step(schedule, multiples)


def _values_of(array: Any) -> list[Any]:
    """The entries of an array or tensor of whole numbers."""
    values: Any = array.tolist()
    if not isinstance(values, list) or not all(map(is_whole, values)):
        raise _no_schedule(array)
    return values


def _multiple_per_step(schedule: Any, multiples: tuple[int, ...], place: str = "") -> tuple[int, ...]:
    if isinstance(schedule, str) or not isinstance(schedule, Sequence):
        raise _no_schedule(schedule, place)
    schedule = tuple(map(read_multiple, schedule))
    for index, multiple in enumerate(schedule):
        # left out, the multiples take in those that span frames from the schedule
        spans = multiple in TEMPORAL_MULTIPLES and multiples == SUPPORTED_MULTIPLES
        if not is_whole(multiple) or (multiple != SKIP and multiple not in multiples and not spans):
            raise no_multiple(index, multiple, multiples, place)
    return tuple(int(multiple) for multiple in schedule)


def _no_schedule(schedule: Any, place: str = "") -> ScheduleError:
    return ScheduleError(
        f"{place}schedule={shown(schedule)}: pass one multiple per step, as in [1, 1, 1, 2, 4], a callable "
        "(step index, {multiple: sigma}) -> multiple, or the path of a .json file of `ddit-rt fit`."
    )


def no_multiple(index: int, multiple: Any, multiples: tuple[int, ...], place: str = "") -> ScheduleError:
    return ScheduleError(
        f"{place}schedule[{index}]={shown(multiple)} is not among multiples={multiples}, nor {SKIP} for no model call."
    )
