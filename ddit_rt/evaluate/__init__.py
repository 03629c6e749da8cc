"""Speed and quality, always together and against the same base output."""

from .methods import Method
from .metrics import psnr, ssim
from .outcome import Outcome, generate
from .summary import Summary, summarise
from .sweep import Plan, run_sweep
from .teafit import TeaCacheFit, fit_teacache

__all__ = [
    "Method",
    "Outcome",
    "Plan",
    "Summary",
    "TeaCacheFit",
    "fit_teacache",
    "generate",
    "psnr",
    "run_sweep",
    "ssim",
    "summarise",
]
