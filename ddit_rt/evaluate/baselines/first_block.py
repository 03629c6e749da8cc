"""FirstBlockCache of diffusers: the other blocks are skipped while the first one's output hardly changes."""

from __future__ import annotations

from diffusers import FirstBlockCacheConfig

from ..methods import Method
from .base import Listing, StepCache


class FirstBlock(StepCache):
    """At one threshold."""

    name, kind = "first-block", "FirstBlockCache"
    config_class = FirstBlockCacheConfig

    def methods(self, listing: Listing) -> list[Method]:
        return [self.method("0.1", listing.steps, threshold=0.1)]
