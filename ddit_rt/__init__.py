"""Diffusion transformers that choose their patch size anew at every denoising step (DDiT, arXiv 2602.16968)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from . import ops, resize
    from .api import accelerate, accelerated, fit, quantize, report, restore, warmup
    from .cache_config import TeaCacheConfig
    from .config import DDiTConfig
    from .errors import AdapterMismatchError, ConfigError, DDiTError, ScheduleError, UnsupportedPipelineError
    from .granularity import Adapter, load_adapter, push_to_hub, save_adapter
    from .schedule import FittedSchedule, Report, StepRecord

__all__ = [
    "Adapter",
    "AdapterMismatchError",
    "ConfigError",
    "DDiTConfig",
    "DDiTError",
    "FittedSchedule",
    "Report",
    "ScheduleError",
    "StepRecord",
    "TeaCacheConfig",
    "UnsupportedPipelineError",
    "accelerate",
    "accelerated",
    "fit",
    "load_adapter",
    "ops",
    "push_to_hub",
    "quantize",
    "report",
    "resize",
    "restore",
    "save_adapter",
    "warmup",
]

# loaded when first asked for, so that the command line answers without importing torch and diffusers
_SOURCES = {
    "api": ("accelerate", "accelerated", "fit", "quantize", "report", "restore", "warmup"),
    "cache_config": ("TeaCacheConfig",),
    "config": ("DDiTConfig",),
    "errors": ("AdapterMismatchError", "ConfigError", "DDiTError", "ScheduleError", "UnsupportedPipelineError"),
    "granularity": ("Adapter", "load_adapter", "push_to_hub", "save_adapter"),
    "schedule": ("FittedSchedule", "Report", "StepRecord"),
}
_SOURCE_OF = {name: module for module, names in _SOURCES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("ops", "resize"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _SOURCE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_SOURCE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
