"""When to be coarse: the evolution of the latent, the decision, and the record of every step."""

from .history import EvolutionHistory
from .increments import step_with_increment
from .policy import Policy, check_length, coarsest_below
from .records import Report, StepRecord

__all__ = [
    "EvolutionHistory",
    "Policy",
    "Report",
    "StepRecord",
    "check_length",
    "coarsest_below",
    "step_with_increment",
]
