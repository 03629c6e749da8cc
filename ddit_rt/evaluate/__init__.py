"""Speed and quality, always together and against the same two pictures: the plain one and the converged one."""

from ..schedule import PSNR_LIMIT
from .adherence import adherence_note
from .analyses import Analysis, Misses, plot_sigma, write_lines, write_misses, write_schedules
from .baselines import BASELINES, Baseline, Library, Listing, OtherSolver, StepCache, runs_twice
from .clips import Clip, beside, contact_sheet, read_clip, save_clip, to_clip, webp
from .columns import COMPARED, FRAMES, MEASURED
from .comparison import Comparison, compare, compare_all, write_comparisons
from .curves import plot_curves, plot_frames
from .gallery import write_gallery
from .judges import JUDGES
from .measurement import generate
from .methods import Method
from .metrics import PAIRED, TO_CONVERGED
from .news import CoarseNews, coarse_news, write_news
from .prompts import load_prompts
from .settings import read_methods
from .standard import APART, standard_plan, with_adapter
from .summary import Summary, judge_pictures, summarise, table, write_results
from .sweep import PLAN, Plan, holds_videos, noise_seed, read_rows, run_sweep
from .unavailable import MetricUnavailableError
from .video_metrics import CLIP, CLIP_PAIRED, error_growth, flicker, growth_of, psnr_of_frames, warping

__all__ = [
    "APART",
    "BASELINES",
    "CLIP",
    "CLIP_PAIRED",
    "COMPARED",
    "FRAMES",
    "JUDGES",
    "MEASURED",
    "PAIRED",
    "PLAN",
    "PSNR_LIMIT",
    "TO_CONVERGED",
    "Analysis",
    "Baseline",
    "Clip",
    "CoarseNews",
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
    "beside",
    "coarse_news",
    "compare",
    "compare_all",
    "contact_sheet",
    "error_growth",
    "flicker",
    "generate",
    "growth_of",
    "holds_videos",
    "judge_pictures",
    "load_prompts",
    "noise_seed",
    "plot_curves",
    "plot_frames",
    "plot_sigma",
    "psnr_of_frames",
    "read_clip",
    "read_methods",
    "read_rows",
    "run_sweep",
    "runs_twice",
    "save_clip",
    "standard_plan",
    "summarise",
    "table",
    "to_clip",
    "warping",
    "webp",
    "with_adapter",
    "write_comparisons",
    "write_gallery",
    "write_lines",
    "write_misses",
    "write_news",
    "write_results",
    "write_schedules",
]
