"""The demo model that ships with the package: loading and showing it."""

from .pipeline import CALL_DEFAULTS, DEMO_PROMPTS, DISTILL_PROMPTS, MODEL_DIR, load_pipeline

__all__ = ["CALL_DEFAULTS", "DEMO_PROMPTS", "DISTILL_PROMPTS", "MODEL_DIR", "load_pipeline"]
