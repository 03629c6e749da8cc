"""The policy that a configuration asks for."""

from __future__ import annotations

from typing import Any

from ..config import DDiTConfig
from .policy import CallableSchedule, FixedSchedule, Policy
from .solver import check_reference
from .target import TargetPolicy
from .threshold import ThresholdPolicy


def origin_of(config: DDiTConfig) -> str:
    """What chooses the steps of a call by ``config``, as :class:`~ddit_rt.schedule.Report` has it."""
    if config.schedule is not None:
        return "given"
    return "rule" if config.has_target else "threshold"


def check_aim(config: DDiTConfig, scheduler: Any) -> None:
    """Refuses to aim where a scheduler's runs have nothing to aim at; see :func:`check_reference`.

    Args:
        config: Settings.
        scheduler: Of the pipeline.

    Raises:
        ConfigError: naming the setting.
    """
    check_reference("converged" if config.aims_at_converged else "plain", scheduler, config.toward_converged)


def make_policy(config: DDiTConfig, max_consecutive_coarse: int | None, boundaries: tuple[float, ...] = ()) -> Policy:
    """The policy of ``config``: its ``schedule``, its ``speedup``, or the paper's threshold rule.

    Args:
        config: Settings.
        max_consecutive_coarse: Limit of the threshold rule, with ``"auto"`` resolved by the coarse path.
        boundaries: Noise levels below which another transformer takes over.
    """
    schedule = config.schedule
    if isinstance(schedule, Policy):
        return schedule
    if callable(schedule):
        return CallableSchedule(schedule, config.multiples)
    if schedule is not None:
        return FixedSchedule(schedule)
    if config.has_target:
        return TargetPolicy(config.speedup, config.reference, config.chosen_target, config.quality, boundaries)
    return ThresholdPolicy(
        config.threshold,
        config.initial_full_steps,
        max_consecutive_coarse,
        config.skip_below,
        config.max_consecutive_skipped,
    )
