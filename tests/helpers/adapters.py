"""Adapters for tiny pipelines."""

from __future__ import annotations

from typing import Any

import torch

from ddit_rt.families import family_of, fresh_adapter
from ddit_rt.granularity import Adapter


def fresh(pipe: Any, **options: Any) -> Adapter:
    torch.manual_seed(0)
    return fresh_adapter(family_of(pipe), pipe.transformer, rank=options.pop("rank", 4), **options)


def trained(pipe: Any, **options: Any) -> Adapter:
    """Every weight moved, as training would."""
    adapter = fresh(pipe, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02)
    return adapter
