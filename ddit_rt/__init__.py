"""Diffusion transformers that choose their patch size anew at every denoising step (DDiT, arXiv 2602.16968)."""

from . import ops, resize
from .accelerate import accelerate, accelerated, report, restore
from .config import DDiTConfig, TeaCacheConfig
from .errors import AdapterMismatchError, ConfigError, DDiTError, ScheduleError, UnsupportedPipelineError
from .granularity import Adapter, load_adapter, push_to_hub, save_adapter
from .schedule import Report, StepRecord
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterMismatchError",
    "ConfigError",
    "DDiTConfig",
    "DDiTError",
    "Report",
    "ScheduleError",
    "StepRecord",
    "TeaCacheConfig",
    "UnsupportedPipelineError",
    "accelerate",
    "accelerated",
    "load_adapter",
    "ops",
    "push_to_hub",
    "report",
    "resize",
    "restore",
    "save_adapter",
    "warmup",
]
