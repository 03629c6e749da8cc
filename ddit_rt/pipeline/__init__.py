"""One accelerated pipeline: what is patched, the state of a call, the execution of a step, caches, checks."""

from .accelerated_pipeline import AcceleratedPipeline
from .inspection import inspect_pipeline, pipeline_of_configs, supported
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
from .progress import Progress, Watcher
from .targets import SHIPPED_SCHEDULES, arguments_seen, identity_of, key_of_call
from .watching import POLICY_SETTINGS, configured, settings_of_call, watched

__all__ = [
    "DEMO",
    "POLICY_SETTINGS",
    "SHIPPED",
    "SHIPPED_SCHEDULES",
    "AcceleratedPipeline",
    "Progress",
    "Watcher",
    "accelerate",
    "accelerated",
    "arguments_seen",
    "call_arguments",
    "call_defaults",
    "check_call",
    "configured",
    "default_device",
    "example_prompts",
    "find_accelerated",
    "identity_of",
    "inspect_pipeline",
    "key_of_call",
    "load_any",
    "pipeline_of_configs",
    "report",
    "restore",
    "settings_of_call",
    "supported",
    "warmup",
    "watched",
]
