"""The models that ship with the package: loading and showing them."""

from .pipeline import (
    ADAPTER,
    CALL_DEFAULTS,
    DEMO_PROMPTS,
    DEMO_THRESHOLD,
    DISTILL_PROMPTS,
    FITTED,
    FITTED_ADAPTER,
    MODEL_DIR,
    load_pipeline,
)
from .showcase import print_summary, run_showcase
from .video_showcase import print_video_summary, run_video_showcase

__all__ = [
    "ADAPTER",
    "CALL_DEFAULTS",
    "DEMO_PROMPTS",
    "DEMO_THRESHOLD",
    "DISTILL_PROMPTS",
    "FITTED",
    "FITTED_ADAPTER",
    "MODEL_DIR",
    "load_pipeline",
    "print_summary",
    "print_video_summary",
    "run_showcase",
    "run_video_showcase",
]
