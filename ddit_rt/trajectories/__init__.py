"""Runs of a pipeline: recorded, replayed, and compared."""

from .fidelity import frames_of_all, psnr, ssim
from .generation import Outcome, generate, save, timed_call
from .recorder import Errors, PipelineRecorder, PlainRun
from .recording import Recording, Shard, record, sole_transformer

__all__ = [
    "Errors",
    "Outcome",
    "PipelineRecorder",
    "PlainRun",
    "Recording",
    "Shard",
    "frames_of_all",
    "generate",
    "psnr",
    "record",
    "save",
    "sole_transformer",
    "ssim",
    "timed_call",
]
