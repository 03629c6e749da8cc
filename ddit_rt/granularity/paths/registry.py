"""The coarse paths by name."""

from __future__ import annotations

from ..adapter.model import Adapter
from .adapter import AdapterPath
from .band_split import BandSplitPath
from .base import CoarsePath
from .forecast import ForecastPath
from .naive import NaivePath


def make_path(name: str, residual: str, adapter: Adapter | None = None, high_band: str = "clean") -> CoarsePath:
    """The path of a (resolved, not "auto") ``DDiTConfig.coarse``; the adapter's paths need ``adapter``."""
    match name:
        case "delta":
            return BandSplitPath(delta=True, extrapolate=residual == "linear", line=high_band == "line")
        case "band-split":
            return BandSplitPath(delta=False)
        case "naive":
            return NaivePath()
        case "adapter" | "adapter-delta":
            assert adapter is not None
            return AdapterPath(adapter, delta=name == "adapter-delta", extrapolate=residual == "linear")
        case _:
            return ForecastPath(linear=name == "extrapolate")
