"""Trained adapters: their weights, files, LoRA, and the models they fit."""

from .file import load_adapter, push_to_hub, save_adapter
from .lora import LoraSet, is_fused
from .matching import ModelFacts, check_fit, fingerprint
from .merged import MergedSet
from .model import Adapter, AdapterSpec

__all__ = [
    "Adapter",
    "AdapterSpec",
    "LoraSet",
    "MergedSet",
    "ModelFacts",
    "check_fit",
    "fingerprint",
    "is_fused",
    "load_adapter",
    "push_to_hub",
    "save_adapter",
]
