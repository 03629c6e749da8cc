"""``ddit-rt fit --export``: fitted schedules for engines whose own caches skip steps."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .terminal import importing, print_json, print_line

if TYPE_CHECKING:
    from ..schedule import FittedSchedule


class Export(StrEnum):
    """Engines whose caches can follow a fitted schedule."""

    cache_dit = "cache-dit"
    sglang = "sglang"


def kinds_to_export(export: Export, multiples: list[int] | None, reference: str) -> list[int]:
    """What steps may be, so that the engine can run them; asked before a fit of minutes.

    Raises:
        ConfigError: the fit would find what cannot be exported.
    """
    if reference != "plain":
        raise ConfigError(
            f"reference={reference!r} with --export {export.value}: such schedules move noise levels, which it cannot; "
            "use --reference plain."
        )
    coarse = next((k for k in multiples or () if k > 1), None)
    if coarse is not None:
        raise ConfigError(f"kinds with {coarse} and --export {export.value}: it has no coarse steps; use --kinds 1,0.")
    return [1, 0] if multiples is None else multiples


def write_export(export: Export, found: FittedSchedule, output: Path, guided: bool | None, as_json: bool) -> None:
    """Writes what cache-dit reads beside ``output``, or prints the lines to source before SGLang starts.

    Args:
        export: The engine.
        found: The schedule.
        output: Its own file.
        guided: Whether guidance makes a call of its own; None leaves that to cache-dit.
        as_json: Print JSON.

    Raises:
        ScheduleError: it has what the engine cannot run.
    """
    with importing():
        from ..integrations import cache_dit, sglang_environment

    if export is Export.cache_dit:
        path = cache_dit.export(found, output.with_suffix(".cache-dit.json"), guided)
        if as_json:
            print_json(cache_dit.cache_settings(found, guided))
        else:
            print_line(f"{path}: for cache-dit, {found.schedule.count(1)} of {len(found.schedule)} steps")
        return
    variables = sglang_environment(found)
    if as_json:
        print_json(variables)
        return
    for name, value in variables.items():
        print_line(f"export {name}={value}")
