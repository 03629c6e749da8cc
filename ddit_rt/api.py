"""The public calls."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from . import pipeline
from .config import DDiTConfig
from .fitting import FirstCalls
from .fitting import fit_schedule as fit
from .granularity import Adapter
from .pipeline import quantize, report, restore, warmup

__all__ = ["accelerate", "accelerated", "fit", "quantize", "report", "restore", "warmup"]

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
    return pipeline.accelerate(pipe, adapter, config, FirstCalls, **overrides)


def accelerated(
    pipe: Pipe,
    adapter: str | Path | Adapter | None = None,
    config: DDiTConfig | Mapping[str, Any] | str | Path | None = None,
    **overrides: Any,
) -> AbstractContextManager[Pipe]:
    """:func:`accelerate` for the length of a ``with`` block, :func:`restore` at its end."""
    return pipeline.accelerated(pipe, adapter, config, FirstCalls, **overrides)
