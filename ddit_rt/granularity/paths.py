"""The coarse paths by name."""

from __future__ import annotations

from .adapter import Adapter
from .coarse import BandSplit, CoarsePath, Forecast, PatchTokens
from .learned import Learned


def make_path(name: str, residual: str, adapter: Adapter | None = None, high_band: str = "clean") -> CoarsePath:
    """The path of a (resolved, not "auto") ``DDiTConfig.coarse``; the adapter's paths need ``adapter``."""
    match name:
        case "delta":
            return BandSplit(delta=True, extrapolate=residual == "linear", line=high_band == "line")
        case "band-split":
            return BandSplit(delta=False)
        case "naive":
            return PatchTokens()
        case "adapter" | "adapter-delta":
            assert adapter is not None
            return Learned(adapter, delta=name == "adapter-delta", extrapolate=residual == "linear")
        case _:
            return Forecast(linear=name == "extrapolate")
