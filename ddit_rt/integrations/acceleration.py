"""What every engine's plug-in does with a diffusers pipeline: accelerate it, run a request, tell what happened."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .. import __version__
from ..errors import DDiTError, ScheduleError
from ..pipeline import accelerate, configured, find_accelerated
from .settings import PluginSettings, request_settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# a request's settings are the pipeline's for the length of its call
_one_call = threading.Lock()


def accelerate_for(engine: str, pipe: Any, settings: PluginSettings) -> bool:
    """Accelerates what an engine has loaded. Whatever stands against it is logged, and the pipeline is as it was.

    Args:
        engine: Its name, for the log.
        pipe: A pipeline of diffusers, moved, compiled and cached as the engine wants it.
        settings: Of the plug-in.

    Returns:
        Whether the pipeline is accelerated.
    """
    name = type(pipe).__name__
    try:
        accelerate(pipe, settings.adapter, settings.config)
    # an engine serves on without us
    except Exception as error:
        reason = str(error) if isinstance(error, DDiTError) else f"{type(error).__name__}: {error}"
        logger.warning("ddit_rt NOT APPLIED, %s runs %s plain: %s", engine, name, reason)
        return False
    told = {field: getattr(settings.config, field) for field in settings.config.model_fields_set}
    wanted = {field: value for field, value in told.items() if value is not None} or {
        "speedup": settings.config.speedup
    }
    adapter = "" if settings.adapter is None else f", adapter={settings.adapter!r}"
    shown = ", ".join(f"{field}={value!r}" for field, value in wanted.items())
    logger.warning("ddit_rt %s APPLIED to %s of %s: %s%s", __version__, name, engine, shown, adapter)
    return True


def steps_of_call(pipe: Any, given: Mapping[str, Any]) -> int | None:
    """How many steps a call will make; None where it may make a part of them, or does not say.

    Args:
        pipe: The engine's pipeline.
        given: Arguments that the engine passes on, by name; what the call does not take is dropped, as engines do, and
            its defaults stand for the rest.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    if values.get("strength", 1) != 1:  # how the part is rounded is the pipeline's
        return None
    steps = values.get("num_inference_steps")
    return steps if isinstance(steps, int) else None


def run_request(
    pipe: Any, wanted: Any, steps: int | None, call: Callable[[], Result]
) -> tuple[Result, dict[str, Any] | None]:
    """Runs one request of an engine, by settings of its own if it has some.

    Engines warm up with runs of one or two steps, and clients who never heard of us may ask for as few: where the
    pipeline's settings cannot be followed in so many steps, the request runs plain.

    Args:
        pipe: The engine's pipeline, accelerated or not.
        wanted: Settings that came with the request, or None for the pipeline's.
        steps: As of :func:`steps_of_call`.
        call: Calls the pipeline.

    Returns:
        What ``call`` gives, and what the steps were: ``applied``, and :meth:`ddit_rt.Report.summary` or a ``reason``;
        None for a plain pipeline whose request asked for nothing.

    Raises:
        ConfigError, ScheduleError: the settings cannot be run; nothing was called.
    """
    found = find_accelerated(pipe)
    if found is None:
        if wanted is None:
            return call(), None
        reason = f"this {type(pipe).__name__} is not accelerated; the log of the server's start says why"
        logger.warning("ddit_rt: a request runs plain: %s", reason)
        return call(), {"applied": False, "reason": reason}
    settings: dict[str, Any] = {}
    obstacle = ""
    with _one_call:
        if wanted is not None:
            settings, _ = request_settings(wanted, found.config)
        elif steps is not None:
            try:
                found.policy_of(found.config).start(steps)
            except ScheduleError as error:
                settings, obstacle = {"threshold": 0.0}, str(error)
                logger.warning("ddit_rt: a request of %d steps runs plain: %s", steps, obstacle)
        with configured(pipe, settings):
            before = found.report
            result = call()
            made = found.report
    if obstacle:
        return result, {"applied": False, "reason": obstacle}
    if made is None or made is before:
        reason = "the pipeline's call did not pass through its patched transformer"
        logger.warning("ddit_rt: a request ran plain: %s", reason)
        return result, {"applied": False, "reason": reason}
    return result, {"applied": True, **made.summary()}
