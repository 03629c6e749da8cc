"""One accelerated pipeline: what is patched, the state of a call, the execution of a step, caches, checks."""

from .accelerated_pipeline import AcceleratedPipeline
from .inspection import inspect_pipeline, pipeline_of_configs, supported
from .learning import EndedCall, Learner
from .lifecycle import accelerate, accelerated, find_accelerated, report, restore
from .loading import (
    DEMO,
    DEMO_256,
    DEMO_VIDEO,
    SHIPPED,
    call_arguments,
    call_defaults,
    check_call,
    default_device,
    example_prompts,
    frame_rate,
    is_own,
    load_any,
    makes_videos,
)
from .prepare import own_bar_off, warmup
from .progress import Progress, Watcher
from .quantization import check_scheme, quantize
from .targets import OWN_LEVELS, SHIPPED_SCHEDULES, arguments_seen, has_own_levels, identity_of, key_of_call
from .watching import POLICY_SETTINGS, configured, settings_of_call, watched

__all__ = [
    "DEMO",
    "DEMO_256",
    "DEMO_VIDEO",
    "OWN_LEVELS",
    "POLICY_SETTINGS",
    "SHIPPED",
    "SHIPPED_SCHEDULES",
    "AcceleratedPipeline",
    "EndedCall",
    "Learner",
    "Progress",
    "Watcher",
    "accelerate",
    "accelerated",
    "arguments_seen",
    "call_arguments",
    "call_defaults",
    "check_call",
    "check_scheme",
    "configured",
    "default_device",
    "example_prompts",
    "find_accelerated",
    "frame_rate",
    "has_own_levels",
    "identity_of",
    "inspect_pipeline",
    "is_own",
    "key_of_call",
    "load_any",
    "makes_videos",
    "own_bar_off",
    "pipeline_of_configs",
    "quantize",
    "report",
    "restore",
    "settings_of_call",
    "supported",
    "warmup",
    "watched",
]
