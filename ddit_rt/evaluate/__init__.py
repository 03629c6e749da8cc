"""Speed and quality, always together and against the same base output."""

from .adherence import adherence_note
from .analyses import Analysis, plot_sigma, write_lines, write_schedules
from .baselines import BASELINES, Baseline, Library, Listing, StepCache
from .curves import plot_curves
from .gallery import write_gallery
from .judges import JUDGES
from .measurement import generate
from .methods import Method
from .metrics import PAIRED, MetricUnavailableError
from .prompts import load_prompts
from .standard import APART, standard_plan, with_adapter
from .summary import Summary, judge_pictures, summarise, table, write_results
from .sweep import PLAN, Plan, read_rows, run_sweep

__all__ = [
    "APART",
    "BASELINES",
    "JUDGES",
    "PAIRED",
    "PLAN",
    "Analysis",
    "Baseline",
    "Library",
    "Listing",
    "Method",
    "MetricUnavailableError",
    "Plan",
    "StepCache",
    "Summary",
    "adherence_note",
    "generate",
    "judge_pictures",
    "load_prompts",
    "plot_curves",
    "plot_sigma",
    "read_rows",
    "run_sweep",
    "standard_plan",
    "summarise",
    "table",
    "with_adapter",
    "write_gallery",
    "write_lines",
    "write_results",
    "write_schedules",
]
