"""The public calls: accelerate, accelerated, restore, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from ..config import DDiTConfig
from ..errors import DDiTError
from ..families import family_of
from ..granularity import Adapter, load_adapter
from ..schedule import Report
from .accelerated_pipeline import AcceleratedPipeline
from .plain_state import accelerated_by

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe")


def accelerate(
    pipe: Pipe,
    adapter: str | Path | Adapter | None = None,
    config: DDiTConfig | Mapping[str, Any] | str | Path | None = None,
    **overrides: Any,
) -> Pipe:
    """Makes a diffusers pipeline choose its patch size anew at every denoising step.

    The pipeline is used as before. Its instance is patched (transformers, scheduler, progress bar), no class is; one
    that is already accelerated takes the new settings, and one that shares the transformers of an accelerated pipeline
    takes them over. Do these before: load LoRAs you keep, quantise, compile blocks. LoRA
    loading, ``set_adapters``, CPU offload and exchanging the scheduler also work afterwards.

    Args:
        pipe: A supported pipeline (``UnsupportedPipelineError`` names the classes).
        adapter: Trained adapter (:func:`load_adapter`): path, hub id or the object; None runs coarse steps untrained.
        config: :class:`DDiTConfig`, a mapping of its fields, or the path of a YAML or JSON file of them.
        **overrides: Fields of :class:`DDiTConfig` by name.

    Returns:
        ``pipe`` itself.

    Raises:
        UnsupportedPipelineError, AdapterMismatchError, ScheduleError, ConfigError: before anything is changed.
    """
    settings = DDiTConfig.make(config, overrides)
    if adapter is not None and not settings.chosen_target:
        settings = settings.replace(speedup=None)  # an adapter is there to be run
    family = family_of(pipe)
    folders = [Path(adapter).with_name("schedules")] if isinstance(adapter, str | Path) else []
    trained = None if adapter is None else load_adapter(adapter)
    fresh = AcceleratedPipeline(pipe, family, settings, trained, folders=folders)
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
    **overrides: Any,
) -> Iterator[Pipe]:
    """:func:`accelerate` for the length of a ``with`` block, :func:`restore` at its end."""
    accelerate(pipe, adapter, config, **overrides)
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
    if own is not None or not isinstance(pipe, DiffusionPipeline):
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
