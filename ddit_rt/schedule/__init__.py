"""When to be coarse: policies, the evolution of the latent, schedules, and the report of every step."""

from .bounds import PSNR_LIMIT, check_quality, check_speedup
from .call_key import CallKey, describe_machine, describe_scheduler
from .evolution import (
    EvolutionHistory,
    LatentEvolution,
    PendingEvolution,
    latent_of,
    step_with_increment,
    with_latent,
)
from .fitted import FittedSchedule
from .noise import (
    check_process,
    levels_of,
    noise_of_call,
    noise_setting,
    predicts_flow,
    preserves_variance,
    training_levels,
)
from .placement import (
    WARP,
    evaluation_steps,
    level_at,
    levels_of_evaluations,
    levels_of_steps,
    moved_levels,
    place_evaluations,
    schedule_of,
    steps_of_levels,
    takeovers_of,
)
from .plots import COLOURS, plot_reports
from .policies import check_aim, make_policy, origin_of
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
from .solver import FlowSolver, Ran, check_reference, follows_the_flow, solves_the_flow, trust, way
from .spacing import initial_steps, one_in, pattern
from .store import Located, ScheduleStore, StoredSchedule, cache_directory
from .target import TargetPolicy
from .threshold import ThresholdPolicy
from .unipc import without_waiting

__all__ = [
    "COLOURS",
    "PSNR_LIMIT",
    "WARP",
    "CallKey",
    "CallableSchedule",
    "Evolution",
    "EvolutionHistory",
    "FittedSchedule",
    "FixedSchedule",
    "FlowSolver",
    "KnownEvolution",
    "LatentEvolution",
    "Located",
    "PendingEvolution",
    "Policy",
    "Ran",
    "Report",
    "ScheduleStore",
    "Spacing",
    "StepRecord",
    "StepView",
    "StoredSchedule",
    "TargetPolicy",
    "ThresholdPolicy",
    "cache_directory",
    "check_aim",
    "check_process",
    "check_quality",
    "check_reference",
    "check_speedup",
    "choices_along",
    "coarsest_below",
    "describe_machine",
    "describe_scheduler",
    "evaluation_steps",
    "follows_the_flow",
    "initial_steps",
    "latent_of",
    "level_at",
    "levels_of",
    "levels_of_evaluations",
    "levels_of_steps",
    "make_policy",
    "moved_levels",
    "noise_of_call",
    "noise_setting",
    "one_in",
    "origin_of",
    "pattern",
    "place_evaluations",
    "plot_reports",
    "predicts_flow",
    "preserves_variance",
    "schedule_of",
    "solves_the_flow",
    "step_with_increment",
    "steps_of_levels",
    "takeovers_of",
    "training_levels",
    "trust",
    "way",
    "with_latent",
    "without_waiting",
]
