"""What a coarse step computes: a file per coarse path, and the registry of their names."""

from .adapter import AdapterPath
from .base import Anchor, CoarsePath, Models, PredictionHistory, RunBands, line
from .registry import PathOptions, default_path, make_path, path_names, register_path

__all__ = [
    "AdapterPath",
    "Anchor",
    "CoarsePath",
    "Models",
    "PathOptions",
    "PredictionHistory",
    "RunBands",
    "default_path",
    "line",
    "make_path",
    "path_names",
    "register_path",
]
