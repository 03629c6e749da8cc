"""Distillation: trains an adapter against the frozen base model (paper, section 3.2)."""

from .config import DistillConfig
from .data import BadDataError, Checked, Pictures, Prompts, picture_dataset, picture_folder, read_prompts
from .recording import Recording, record
from .recordings import Library
from .trainer import Evaluation, Trainer

__all__ = [
    "BadDataError",
    "Checked",
    "DistillConfig",
    "Evaluation",
    "Library",
    "Pictures",
    "Prompts",
    "Recording",
    "Trainer",
    "picture_dataset",
    "picture_folder",
    "read_prompts",
    "record",
]
