"""One accelerated pipeline: what is patched, the state of a call, the execution of a step, caches, checks."""

from .inspection import inspect_pipeline
from .lifecycle import accelerate, accelerated, find_accelerated, report, restore
from .loading import (
    DEMO,
    SHIPPED,
    call_arguments,
    call_defaults,
    check_call,
    default_device,
    example_prompts,
    load_any,
)
from .prepare import warmup

__all__ = [
    "DEMO",
    "SHIPPED",
    "accelerate",
    "accelerated",
    "call_arguments",
    "call_defaults",
    "check_call",
    "default_device",
    "example_prompts",
    "find_accelerated",
    "inspect_pipeline",
    "load_any",
    "report",
    "restore",
    "warmup",
]
