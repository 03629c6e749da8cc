"""TeaCache (arXiv 2411.19108): the blocks are skipped while their input hardly changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.utils.torch_utils import unwrap_module

from ...cache_config import TeaCacheConfig
from ...families import denoisers, family_of
from ...fitting import fit_teacache
from ...runtime import TeaCacheDefaults
from ..methods import Method
from .base import Listing, StepCache

SPEEDUPS = (1.5, 2.0, 3.0)
"""Share of skipped steps for which the threshold is found where no published one applies."""

FACTORS = (0.6, 1, 1.5, 2)
"""Of the published threshold, elsewhere."""


class TeaCache(StepCache):
    """At the published coefficients and around the published threshold, or at those fitted to the model."""

    name, kind = "teacache", "TeaCache"
    config_class = TeaCacheConfig

    def methods(self, listing: Listing) -> list[Method]:
        shared: dict[str, Any] = {}
        if listing.fit:
            listing.progress("fitting TeaCache")
            found = fit_teacache(listing.pipe, listing.prompts[:2], **listing.call)
            shared = {"coefficients": list(found.coefficients)}
            thresholds = {f"{s:g}x": found.threshold_for(s) for s in (SPEEDUPS if listing.full else (2.0,))}
        else:
            published = _published(listing.pipe).threshold
            factors = FACTORS if listing.full else (1,)
            thresholds = {f"{published * factor:g}": published * factor for factor in factors}
        return [self.method(label, listing.steps, threshold=value, **shared) for label, value in thresholds.items()]

    @classmethod
    def gentlest(cls, methods: Sequence[Method]) -> dict[str, Any]:
        """The ``cache`` of the one among ``methods`` that skips least."""
        caches = [dict(method.settings["cache"]) for method in methods if method.settings and method.kind == cls.kind]
        return min(caches, key=lambda cache: cache["threshold"])


def _published(pipe: Any) -> TeaCacheDefaults:
    family = family_of(pipe)
    module = unwrap_module(next(iter(denoisers(pipe, family).values())))
    return family.trunk(module).published
