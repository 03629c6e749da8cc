"""Skipped steps at fixed spacing, never corrected: the last predictions extrapolated linearly, or the last reused."""

from __future__ import annotations

from ...multiples import SKIP
from ...schedule import one_in
from ..methods import Method
from .base import Baseline, Listing, fixed


class Extrapolation(Baseline):
    """One full step in n; the others make no model call."""

    name = "extrapolation"

    def methods(self, listing: Listing) -> list[Method]:
        steps = listing.steps
        methods = [
            fixed(f"extrapolate-{n}", "linear extrapolation", steps, one_in(steps, n, SKIP), corrector=False)
            for n in ((2, 3, 4, 6) if listing.full else (2, 3))
        ]
        if listing.full:
            # a skipped step is extrapolated whatever the path; the path that reuses stands in for a coarse step
            methods.append(fixed("reuse-3", "reuse", steps, one_in(steps, 3, 2), coarse="reuse", corrector=False))
        return methods
