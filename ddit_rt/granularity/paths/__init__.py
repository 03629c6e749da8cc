"""What a coarse step computes: one file per coarse path."""

from .adapter import AdapterPath
from .base import Anchor, CoarsePath, Models, PredictionHistory, line
from .registry import make_path

__all__ = ["AdapterPath", "Anchor", "CoarsePath", "Models", "PredictionHistory", "line", "make_path"]
