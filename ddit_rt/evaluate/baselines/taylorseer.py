"""TaylorSeer of diffusers (arXiv 2503.06923): steps forecast by a Taylor series of earlier ones."""

from __future__ import annotations

import torch
from diffusers import TaylorSeerCacheConfig

from ..methods import Method
from .base import Listing, StepCache


class TaylorSeer(StepCache):
    """Over the interval of full computation, in the lite mode: it predicts the output and skips all blocks."""

    name, kind = "taylorseer", "TaylorSeer"
    config_class = TaylorSeerCacheConfig
    # diffusers would keep the factors in bfloat16, which a float32 model need not suffer
    defaults = {"taylor_factors_dtype": torch.float32}  # noqa: RUF012 read only

    def methods(self, listing: Listing) -> list[Method]:
        intervals = (3, 5) if listing.full else (4,)
        return [self.method(f"{n}", listing.steps, cache_interval=n, use_lite_mode=True) for n in intervals]
