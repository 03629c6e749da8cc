"""When to be coarse: policies, the evolution of the latent, schedules, and the report of every step."""

from .call_key import CallKey, describe_scheduler
from .evolution import EvolutionHistory, LatentEvolution, PendingEvolution, step_with_increment
from .fitted import FittedSchedule
from .plots import COLOURS, plot_reports
from .policies import make_policy
from .policy import (
    CallableSchedule,
    Evolution,
    FixedSchedule,
    KnownEvolution,
    Policy,
    Spacing,
    StepView,
    choices_along,
    coarsest_below,
)
from .report import Report, StepRecord
from .spacing import initial_steps, one_in, pattern
from .store import ScheduleStore, StoredSchedule, cache_directory
from .targets import check_speedup
from .threshold import ThresholdPolicy

__all__ = [
    "COLOURS",
    "CallKey",
    "CallableSchedule",
    "Evolution",
    "EvolutionHistory",
    "FittedSchedule",
    "FixedSchedule",
    "KnownEvolution",
    "LatentEvolution",
    "PendingEvolution",
    "Policy",
    "Report",
    "ScheduleStore",
    "Spacing",
    "StepRecord",
    "StepView",
    "StoredSchedule",
    "ThresholdPolicy",
    "cache_directory",
    "check_speedup",
    "choices_along",
    "coarsest_below",
    "describe_scheduler",
    "initial_steps",
    "make_policy",
    "one_in",
    "pattern",
    "plot_reports",
    "step_with_increment",
]
