"""Speed and quality, always together and against the same base output."""

from .metrics import psnr, ssim
from .outcome import Outcome, generate

__all__ = ["Outcome", "generate", "psnr", "ssim"]
