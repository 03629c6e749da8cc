"""The state of a run on disk: written beside and renamed, so that whatever interrupts it, a whole one is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError


def save_atomic(path: Path, state: Any) -> None:
    """Writes ``state`` (tensors, numbers, texts, lists and dicts of them) and makes sure it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(path: Path) -> Any:
    """Reads what :func:`save_atomic` wrote, on the CPU; executes no code of the file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise ConfigError(f"{path} cannot be read ({error!r}): delete it to start anew.") from error
