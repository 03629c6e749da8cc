"""Accelerated pipelines whose graphs are captured on the CPU."""

from __future__ import annotations

from typing import Any

import ddit_rt
from ddit_rt.families import family_of
from ddit_rt.granularity import Adapter
from ddit_rt.pipeline.accelerated_pipeline import AcceleratedPipeline
from ddit_rt.runtime import Recording


def recorded(pipe: Any, adapter: Adapter | None = None, **settings: Any) -> Recording:
    """Accelerates ``pipe`` with a recorder and returns it; ``ddit_rt.restore`` undoes it as usual."""
    recording = Recording()
    made = AcceleratedPipeline(pipe, family_of(pipe), ddit_rt.DDiTConfig(**settings), adapter, capture=recording)
    made.attach()
    return recording
