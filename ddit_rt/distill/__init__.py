"""Distillation: trains an adapter against the frozen base model (paper, section 3.2)."""

from .config import DistillConfig
from .cost import estimate
from .data import BadDataError, Checked, Pictures, Prompts, picture_dataset, picture_folder, read_prompts
from .recordings import Library
from .trainer import Trainer
from .validation import Evaluation

__all__ = [
    "BadDataError",
    "Checked",
    "DistillConfig",
    "Evaluation",
    "Library",
    "Pictures",
    "Prompts",
    "Trainer",
    "estimate",
    "picture_dataset",
    "picture_folder",
    "read_prompts",
]
