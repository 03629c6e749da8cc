"""The noise process of a pipeline's model, from its scheduler."""

from __future__ import annotations

from typing import Any

from ..granularity import VariancePreserving
from ..schedule import predicts_flow, training_levels


def process_of(scheduler: Any) -> VariancePreserving | None:
    """What turns flow states and velocities into the latents and predictions of a scheduler's model; None for a flow.

    Args:
        scheduler: That :func:`ddit_rt.schedule.check_process` lets pass.
    """
    if predicts_flow(scheduler):
        return None
    return VariancePreserving(scheduler.config.prediction_type, training_levels(scheduler))
