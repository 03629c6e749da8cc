"""In place of torchvision where only its names are imported: what is called raises."""

from . import io, models, ops, transforms

__all__ = ["io", "models", "ops", "transforms"]
__version__ = "0.0"
