"""When to be coarse: policies, the evolution of the latent, schedules, and the report of every step."""

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
from .targets import check_speedup
from .threshold import ThresholdPolicy

__all__ = [
    "COLOURS",
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
    "Spacing",
    "StepRecord",
    "StepView",
    "ThresholdPolicy",
    "check_speedup",
    "choices_along",
    "coarsest_below",
    "initial_steps",
    "make_policy",
    "one_in",
    "pattern",
    "plot_reports",
    "step_with_increment",
]
