"""Fewer denoising steps of the plain pipeline."""

from __future__ import annotations

from ..methods import Method
from .base import Baseline, Listing


class FewerSteps(Baseline):
    """A half, a third and a quarter of the steps."""

    name = "fewer-steps"

    def methods(self, listing: Listing) -> list[Method]:
        steps = listing.steps
        counts = dict.fromkeys(round(steps / share) for share in ((2, 3, 4) if listing.full else (2, 3)))
        return [Method(f"{count}-steps@{steps}", "fewer steps", count, steps) for count in counts]
