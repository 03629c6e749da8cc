"""The noise process of a pipeline's model, from its scheduler."""

from __future__ import annotations

from typing import Any

from ..granularity import FLOW, Process, VariancePreserving
from ..schedule import predicts_flow, training_levels


def process_of(scheduler: Any) -> Process:
    """What turns flow states and velocities into the latents and predictions of a scheduler's model.

    Args:
        scheduler: That :func:`ddit_rt.schedule.check_process` lets pass.
    """
    if predicts_flow(scheduler):
        return FLOW
    return VariancePreserving(scheduler.config.prediction_type, training_levels(scheduler))
