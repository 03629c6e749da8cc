"""Runs of a pipeline: recorded, replayed, and compared."""

from .fidelity import frames_of_all, psnr, ssim
from .generation import Outcome, denoise, generate, save, timed_call
from .recorder import Recorder, Step, StreamCall
from .recording import Recording, Shard, record, sole_transformer
from .replay import AdapterErrors, adapter_errors, coarse_predictions, last_latent_with_error
from .trajectory import Trajectory, record_trajectory

__all__ = [
    "AdapterErrors",
    "Outcome",
    "Recorder",
    "Recording",
    "Shard",
    "Step",
    "StreamCall",
    "Trajectory",
    "adapter_errors",
    "coarse_predictions",
    "denoise",
    "frames_of_all",
    "generate",
    "last_latent_with_error",
    "psnr",
    "record",
    "record_trajectory",
    "save",
    "sole_transformer",
    "ssim",
    "timed_call",
]
