"""Schedules, thresholds and coefficients fitted to a model."""

from .error_model import ErrorModel
from .first_calls import FIRST_CALLS, FirstCalls
from .fitter import Fitter, check_target, fit_schedule
from .measurement import measure
from .real_runs import try_schedule
from .search import find_evaluations, find_schedule
from .step_costs import shares_by_clock
from .teacache import TeaCacheFit, fit_teacache
from .threshold import Calibration, calibrate

__all__ = [
    "FIRST_CALLS",
    "Calibration",
    "ErrorModel",
    "FirstCalls",
    "Fitter",
    "TeaCacheFit",
    "calibrate",
    "check_target",
    "find_evaluations",
    "find_schedule",
    "fit_schedule",
    "fit_teacache",
    "measure",
    "shares_by_clock",
    "try_schedule",
]
