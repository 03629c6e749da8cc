"""MagCache of diffusers (arXiv 2506.09045): steps are skipped while the residual's magnitude hardly changes."""

from __future__ import annotations

from diffusers import MagCacheConfig

from ..methods import Method
from .base import Listing, StepCache


class MagCache(StepCache):
    """For files of methods alone: its ratios have to be calibrated for each model and step count beforehand."""

    name, kind = "magcache", "MagCache"
    config_class = MagCacheConfig

    def methods(self, listing: Listing) -> list[Method]:
        return []
