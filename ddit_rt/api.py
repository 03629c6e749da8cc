"""The public calls."""

from .fitting import fit_schedule as fit
from .pipeline import accelerate, accelerated, quantize, report, restore, warmup

__all__ = ["accelerate", "accelerated", "fit", "quantize", "report", "restore", "warmup"]
