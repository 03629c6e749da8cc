"""One accelerated pipeline: what is patched, the state of a call, the execution of a step, caches, checks."""

from .inspection import inspect_pipeline
from .lifecycle import accelerate, accelerated, find_accelerated, report, restore
from .loading import DEMO, call_arguments, call_defaults, check_size, default_device, load_any
from .prepare import warmup

__all__ = [
    "DEMO",
    "accelerate",
    "accelerated",
    "call_arguments",
    "call_defaults",
    "check_size",
    "default_device",
    "find_accelerated",
    "inspect_pipeline",
    "load_any",
    "report",
    "restore",
    "warmup",
]
