"""When to be coarse: policies, the evolution of the latent, schedules, and the report of every step."""

from .fitted import FittedSchedule
from .history import EvolutionHistory
from .increments import step_with_increment
from .plots import COLOURS, plot_reports
from .policy import Policy, check_length, coarsest_below
from .report import Report, StepRecord
from .spacing import initial_steps, one_in, pattern
from .targets import check_speedup

__all__ = [
    "COLOURS",
    "EvolutionHistory",
    "FittedSchedule",
    "Policy",
    "Report",
    "StepRecord",
    "check_length",
    "check_speedup",
    "coarsest_below",
    "initial_steps",
    "one_in",
    "pattern",
    "plot_reports",
    "step_with_increment",
]
