"""The public calls."""

from .fitting import fit_schedule as fit
from .pipeline import accelerate, accelerated, report, restore, warmup

__all__ = ["accelerate", "accelerated", "fit", "report", "restore", "warmup"]
