"""Gives a pipeline call the noise levels that its policy places, before the pipeline reads its timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ScheduleError
from ..schedule import Policy, solves_the_flow

_NEAR = 1e-4


def place_levels(scheduler: Any, policy: Policy, call: Mapping[str, Any], given_levels: bool = False) -> None:
    """Replaces a scheduler's noise levels and timesteps by those of the policy, if it moves any.

    A call that runs only the last of its steps keeps the scheduler's: it adds noise to a picture at one of them.

    Args:
        scheduler: With the call's timesteps set.
        policy: Whose ``place`` is asked, if it has one.
        call: Arguments of the pipeline's call.
        given_levels: Whether noise levels are among what the caller gave.

    Raises:
        ScheduleError: the schedule has noise levels of its own, and the caller gave others, or the run ends elsewhere.
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
    fixed = bool(getattr(policy, "sigmas", None))
    if fixed and given_levels:
        raise ScheduleError(
            "sigmas: the schedule has noise levels of its own, and the call gives others; leave out one of them, or "
            "give the schedule's multiples alone."
        )
    if fixed and abs(placed[-1] - given[-1]) > _NEAR:
        raise ScheduleError(
            f"schedule: its noise levels end at {placed[-1]:g}, this run's at {given[-1]:g}; take one that was fitted "
            "to such runs."
        )
    levels = torch.tensor(placed, dtype=torch.float32, device=scheduler.sigmas.device)
    scheduler.sigmas = levels
    # whole numbers, as some schedulers have them, would give neighbouring steps the same timestep
    scheduler.timesteps = (levels[:-1] * scheduler.config.num_train_timesteps).to(scheduler.timesteps.device)
