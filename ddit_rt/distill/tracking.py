"""Where a run writes its numbers: ``log.jsonl``, and TensorBoard events on demand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from accelerate.utils import is_tensorboard_available

from ..errors import ConfigError


class JsonLines(GeneralTracker):
    """Appends an object with the step and its numbers, to five digits, to a text file.

    Args:
        path: Of the file; it and its folder are made with the first entry.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    def log(self, values: Mapping[str, float], step: int | None = None, **_: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"step": step, **{name: float(f"{value:.5g}") for name, value in values.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def last_entry(path: Path, step: int) -> dict[str, Any]:
    """The last entry that a ``log.jsonl`` has of a step; empty where it has none."""
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut short by a power failure
        if entry["step"] == step:
            found = entry
    return found


def build_trackers(out: Path, tensorboard: bool) -> list[GeneralTracker | str]:
    """The trackers for ``Accelerator(log_with=...)``; they write nothing yet.

    Args:
        out: Directory of the run.
        tensorboard: Whether to write TensorBoard events too.

    Raises:
        ConfigError: TensorBoard is not installed (accelerate would leave it out silently).
    """
    if tensorboard and not is_tensorboard_available():
        raise ConfigError("TensorBoard is in the extra: pip install 'ddit-rt[distill]', or do without.")
    return [JsonLines(out / "log.jsonl"), *(["tensorboard"] if tensorboard else [])]
