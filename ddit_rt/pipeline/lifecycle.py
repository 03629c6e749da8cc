"""The public calls: accelerate, accelerated, restore, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..config import DDiTConfig
from ..errors import DDiTError
from ..families import family_of
from ..granularity import Adapter, load_adapter
from ..schedule import Report
from .accelerated_pipeline import AcceleratedPipeline

Pipe = TypeVar("Pipe")


def accelerate(
    pipe: Pipe,
    adapter: str | Path | Adapter | None = None,
    config: DDiTConfig | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Pipe:
    """Makes a diffusers pipeline choose its patch size anew at every denoising step.

    The pipeline is used as before. Its instance is patched (transformers and scheduler), no class is; one that is
    already accelerated takes the new settings. Do these before: load LoRAs you keep, quantise, compile blocks. LoRA
    loading, ``set_adapters``, CPU offload and exchanging the scheduler also work afterwards.

    Args:
        pipe: A FLUX or Wan pipeline (``UnsupportedPipelineError`` names the classes).
        adapter: Trained adapter (:func:`load_adapter`): path, hub id or the object; None runs coarse steps untrained.
        config: :class:`DDiTConfig` or a mapping of its fields.
        **overrides: Fields of :class:`DDiTConfig` by name.

    Returns:
        ``pipe`` itself.

    Raises:
        UnsupportedPipelineError, AdapterMismatchError, ScheduleError, ConfigError: before anything is changed.
    """
    settings = DDiTConfig.make(config, overrides)
    family = family_of(pipe)
    fresh = AcceleratedPipeline(pipe, family, settings, None if adapter is None else load_adapter(adapter))
    old = find_accelerated(pipe)
    if old is not None:
        old.detach()
    try:
        fresh.attach()
    except BaseException:
        if old is not None:
            old.attach()
        raise
    pipe.__dict__["_ddit_pipeline"] = fresh
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undoes :func:`accelerate`: the same modules, the same outputs bit for bit. A plain pipeline stays as it is."""
    session = find_accelerated(pipe)
    if session is not None:
        session.detach()
        del pipe.__dict__["_ddit_pipeline"]
    return pipe


@contextmanager
def accelerated(
    pipe: Pipe,
    adapter: str | Path | Adapter | None = None,
    config: DDiTConfig | Mapping[str, Any] | None = None,
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

    Raises:
        DDiTError: the pipeline is not accelerated, or was not called since.
    """
    session = find_accelerated(pipe)
    if session is None:
        raise DDiTError(f"this {type(pipe).__name__} is not accelerated: call ddit_rt.accelerate(pipe) first.")
    if session.report is None:
        raise DDiTError("no report yet: call the accelerated pipeline first.")
    return session.report


def find_accelerated(pipe: Any) -> AcceleratedPipeline | None:
    """The session of an accelerated pipeline; None for any other object."""
    return pipe.__dict__.get("_ddit_pipeline") if hasattr(pipe, "__dict__") else None
