"""Acceleration put on a pipeline and taken off it, and its report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..config import DDiTConfig
from ..errors import ConfigError, DDiTError
from ..families import family_of
from ..granularity import Adapter, load_adapter
from ..schedule import Report
from .accelerated_pipeline import AcceleratedPipeline
from .caller import is_modular, is_pipeline
from .learning import Learner
from .plain_state import accelerated_by

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe")
MakeLearner = Callable[[AcceleratedPipeline], Learner]


def accelerate(
    pipe: Pipe,
    adapter: str | Path | Adapter | None = None,
    config: DDiTConfig | Mapping[str, Any] | str | Path | None = None,
    learn: MakeLearner | None = None,
    **overrides: Any,
) -> Pipe:
    """As :func:`ddit_rt.accelerate`, for who makes the pipeline's calls.

    Args:
        pipe, adapter, config, overrides: As there.
        learn: Makes what hears of calls that have no schedule yet, for ``fit="first-calls"``.

    Raises:
        UnsupportedPipelineError, AdapterMismatchError, ScheduleError: as there.
        ConfigError: as there, or a fit is asked for and nobody would make it, or could.
    """
    settings = DDiTConfig.make(config, overrides)
    if adapter is not None and not settings.chosen_target:
        settings = settings.replace(speedup=None)  # an adapter is there to be run
    if settings.fit is not None and learn is None:
        raise ConfigError(
            f"fit={settings.fit!r}: nothing is fitted here, where a call may not take minutes or is the only one. Fit "
            "before, with `ddit-rt fit` or ddit_rt.fit(pipe, prompts, ...), and leave it out."
        )
    family = family_of(pipe)
    if settings.fit is not None and is_modular(pipe):  # neither its arguments as given nor its end can be heard of
        raise ConfigError(
            f"fit={settings.fit!r}: the calls of {type(pipe).__name__} cannot be fitted to. Fit before, with `ddit-rt "
            "fit` or ddit_rt.fit on the ordinary pipeline of the same model: what that keeps serves this one, too."
        )
    folders = [Path(adapter).with_name("schedules")] if isinstance(adapter, str | Path) else []
    trained = None if adapter is None else load_adapter(adapter)
    fresh = AcceleratedPipeline(pipe, family, settings, trained, folders=folders)
    if fresh.listener is not None and learn is not None:
        fresh.listener.learner = learn(fresh)
    old = _replaceable(pipe, fresh)
    if old is not None:
        old.detach()
    try:
        fresh.attach()
    except BaseException:
        if old is not None:
            old.attach()
        raise
    if old is not None and old.pipe.scheduler is not fresh.pipe.scheduler:
        logger.warning(
            "this %s takes its transformer over from the accelerated %s that it shares it with: the calls of that one "
            "run plain from now on",
            type(pipe).__name__,
            type(old.pipe).__name__,
        )
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undoes :func:`accelerate`: the same modules, the same outputs bit for bit. A plain pipeline stays as it is.

    It follows the components: a pipeline that shares those of an accelerated one restores them.
    """
    found = find_accelerated(pipe)
    if found is not None:
        found.detach()
    return pipe


@contextmanager
def accelerated(
    pipe: Pipe,
    adapter: str | Path | Adapter | None = None,
    config: DDiTConfig | Mapping[str, Any] | str | Path | None = None,
    learn: MakeLearner | None = None,
    **overrides: Any,
) -> Iterator[Pipe]:
    """:func:`accelerate` for the length of a ``with`` block, :func:`restore` at its end."""
    accelerate(pipe, adapter, config, learn, **overrides)
    try:
        yield pipe
    finally:
        restore(pipe)


def report(pipe: Any) -> Report:
    """The :class:`Report` of the pipeline's last call.

    It follows the components: for a pipeline that shares those of an accelerated one, it is that of their last call.

    Raises:
        DDiTError: the pipeline is not accelerated, was not called since, or its last call ran plain because its patches
            had been taken away.
    """
    found = find_accelerated(pipe)
    if found is None:
        raise DDiTError(f"this {type(pipe).__name__} is not accelerated: call ddit_rt.accelerate(pipe) first.")
    if found.report is None:
        raise DDiTError("no report yet: call the accelerated pipeline first.")
    return found.report


def find_accelerated(pipe: Any) -> AcceleratedPipeline | None:
    """What accelerates a pipeline: its own, or that of the transformers it shares; None for any other object."""
    own: AcceleratedPipeline | None = accelerated_by(pipe)
    if own is not None or not is_pipeline(pipe):
        return own
    for component in pipe.components.values():
        found: AcceleratedPipeline | None = accelerated_by(component)
        if found is not None and any(component is module for module in found.transformers.values()):
            return found
    return None


def _replaceable(pipe: Any, fresh: AcceleratedPipeline) -> AcceleratedPipeline | None:
    """What accelerates a pipeline, if it may be replaced: it accelerates the same transformers."""
    old = find_accelerated(pipe)
    same = old is not None and (old.pipe is pipe or old.transformers == fresh.transformers)
    return old if same else None
