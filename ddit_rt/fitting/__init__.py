"""Schedules fitted to a model: when a step may be coarse or free, from measurements instead of a threshold."""

from .fit import FittedSchedule, fit_schedule, measure, tried
from .outlook import Outlook
from .search import search

__all__ = ["FittedSchedule", "Outlook", "fit_schedule", "measure", "search", "tried"]
