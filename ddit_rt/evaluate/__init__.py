"""Speed and quality, always together and against the same two pictures: the plain one and the converged one."""

from .adherence import adherence_note
from .analyses import Analysis, Misses, plot_sigma, write_lines, write_misses, write_schedules
from .baselines import BASELINES, Baseline, Library, Listing, OtherSolver, StepCache, runs_twice
from .comparison import Comparison, compare, compare_all, write_comparisons
from .curves import plot_curves
from .gallery import write_gallery
from .judges import JUDGES
from .measurement import generate
from .methods import Method
from .metrics import COMPARED, PAIRED, TO_CONVERGED, MetricUnavailableError
from .prompts import load_prompts
from .standard import APART, standard_plan, with_adapter
from .summary import Summary, judge_pictures, summarise, table, write_results
from .sweep import PLAN, Plan, read_rows, run_sweep

__all__ = [
    "APART",
    "BASELINES",
    "COMPARED",
    "JUDGES",
    "PAIRED",
    "PLAN",
    "TO_CONVERGED",
    "Analysis",
    "Baseline",
    "Comparison",
    "Library",
    "Listing",
    "Method",
    "MetricUnavailableError",
    "Misses",
    "OtherSolver",
    "Plan",
    "StepCache",
    "Summary",
    "adherence_note",
    "compare",
    "compare_all",
    "generate",
    "judge_pictures",
    "load_prompts",
    "plot_curves",
    "plot_sigma",
    "read_rows",
    "run_sweep",
    "runs_twice",
    "standard_plan",
    "summarise",
    "table",
    "with_adapter",
    "write_comparisons",
    "write_gallery",
    "write_lines",
    "write_misses",
    "write_results",
    "write_schedules",
]
