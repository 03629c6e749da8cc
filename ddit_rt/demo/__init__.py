"""The demo model that ships with the package: loading and showing it."""

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
    "run_showcase",
]
