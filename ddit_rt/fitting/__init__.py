"""Schedules, thresholds and coefficients fitted to a model."""

from .error_model import ErrorModel
from .fitter import Fitter, check_target, fit_schedule
from .measurement import measure
from .real_runs import try_schedule
from .search import find_evaluations, find_schedule
from .teacache import TeaCacheFit, fit_teacache
from .threshold import Calibration, calibrate

__all__ = [
    "Calibration",
    "ErrorModel",
    "Fitter",
    "TeaCacheFit",
    "calibrate",
    "check_target",
    "find_evaluations",
    "find_schedule",
    "fit_schedule",
    "fit_teacache",
    "measure",
    "try_schedule",
]
