"""Gives a pipeline call the noise levels that its policy places, before the pipeline reads its timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..schedule import Policy, solves_the_flow


def place_levels(scheduler: Any, policy: Policy, call: Mapping[str, Any]) -> None:
    """Replaces a scheduler's noise levels and timesteps by those of the policy, if it moves any.

    A call that runs only the last of its steps keeps the scheduler's: it adds noise to a picture at one of them.

    Args:
        scheduler: With the call's timesteps set.
        policy: Whose ``place`` is asked, if it has one.
        call: Arguments of the pipeline's call.
    """
    place = getattr(policy, "place", None)
    if place is None or "strength" in call or not solves_the_flow(scheduler):
        return
    given = scheduler.sigmas.tolist()
    if len(given) != len(scheduler.timesteps) + 1:
        return
    placed = list(place(given))
    if placed == given:
        return
    levels = torch.tensor(placed, dtype=torch.float32, device=scheduler.sigmas.device)
    scheduler.sigmas = levels
    # whole numbers, as some schedulers have them, would give neighbouring steps the same timestep
    scheduler.timesteps = (levels[:-1] * scheduler.config.num_train_timesteps).to(scheduler.timesteps.device)
