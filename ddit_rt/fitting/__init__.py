"""Schedules, thresholds and coefficients fitted to a model."""

from .error_model import ErrorModel
from .fitter import check_target, fit_schedule, try_schedule
from .measurement import measure
from .search import find_evaluations, find_schedule
from .teacache import TeaCacheFit, fit_teacache
from .threshold import Calibration, calibrate

__all__ = [
    "Calibration",
    "ErrorModel",
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
