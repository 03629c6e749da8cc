"""Coarse paths without training at fixed spacing: what a policy and fitted schedules have to beat."""

from __future__ import annotations

from ...schedule import one_in, pattern
from ..methods import Method
from .base import Baseline, Listing, fixed


class FixedSpacing(Baseline):
    """One full step in n and coarse ones between them, by every path; and cycles of full, coarse and skipped steps."""

    name = "fixed-spacing"

    def methods(self, listing: Listing) -> list[Method]:
        steps, full = listing.steps, listing.full
        methods = []
        if full:
            methods.append(fixed("naive-3", "naive 2p", steps, one_in(steps, 3, 2), coarse="naive"))
            methods.append(fixed("band-split-3", "band-split 2p", steps, one_in(steps, 3, 2), coarse="band-split"))
        for n in (3, 6) if full else (2,):
            methods.append(fixed(f"delta-2p-{n}", "delta 2p", steps, one_in(steps, n, 2), coarse="delta"))
        for n in (3, 6) if full else (3,):
            methods.append(fixed(f"delta-4p-{n}", "delta 4p", steps, one_in(steps, n, 4), coarse="delta"))
        for text in ("100400", "10400400") if full else ("1040",):
            cycle = [int(digit) for digit in text]
            methods.append(fixed(f"mix-{text}", "mixed", steps, pattern(steps, cycle), coarse="delta", corrector=False))
        return methods
