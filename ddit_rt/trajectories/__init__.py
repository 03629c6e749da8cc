"""Runs of a pipeline: recorded, replayed, and compared."""

from .batch import MANIFEST, Item, PictureFolder, read_items
from .converged import UNIPC, generate_converged
from .fidelity import frames_of_all, limited_psnr, psnr, ssim
from .generation import Outcome, can_encode, denoise, generate, save, timed_call
from .prompts import Prompt, call_with, name_of
from .recorder import Recorder, Step, StreamCall
from .recording import Recording, Shard, record, sole_transformer
from .replay import AdapterErrors, adapter_errors, coarse_predictions, last_latent_with_error
from .solving import BELOW_ONE, Solver, check_deterministic_flow, respaced, solved_by
from .trajectory import Trajectory, record_trajectory

__all__ = [
    "BELOW_ONE",
    "MANIFEST",
    "UNIPC",
    "AdapterErrors",
    "Item",
    "Outcome",
    "PictureFolder",
    "Prompt",
    "Recorder",
    "Recording",
    "Shard",
    "Solver",
    "Step",
    "StreamCall",
    "Trajectory",
    "adapter_errors",
    "call_with",
    "can_encode",
    "check_deterministic_flow",
    "coarse_predictions",
    "denoise",
    "frames_of_all",
    "generate",
    "generate_converged",
    "last_latent_with_error",
    "limited_psnr",
    "name_of",
    "psnr",
    "read_items",
    "record",
    "record_trajectory",
    "respaced",
    "save",
    "sole_transformer",
    "solved_by",
    "ssim",
    "timed_call",
]
