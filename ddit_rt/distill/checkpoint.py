"""Checkpoints of a run: accelerate's folders, written beside and renamed, so that a whole one is always there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..errors import ConfigError
from ..files import to_disk
from .config import DistillConfig, differences
from .recordings import manifest_differences

_KEPT = 2
_RUN = "run.json"
_UNFINISHED = "unfinished"
_CADENCE = ("checkpoint_every", "validate_every")


class Checkpoints:
    """The last two checkpoints of a run, one folder each, named ``step-000000500``.

    ``accelerate`` writes and reads what it prepared: models as safetensors, optimizer and learning-rate schedule as
    tensors and numbers, so that loading executes no code (objects of ``register_for_checkpointing`` would be unpickled
    without that restriction). ``run.json`` adds the step, the seconds spent, the settings and the recordings'
    manifest. The folders are not named by accelerate, which writes in place and deletes the oldest first: a kill could
    leave half a checkpoint alone.

    Args:
        directory: Of the folders.
        accelerator: Of the run. Every process calls :meth:`save` and :meth:`restore`; the main one renames and deletes.
        manifest: Of the recordings that the run is trained on.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        self._accelerator, self._manifest = accelerator, manifest
        # without the wrapper of a distributed run, so that a run can go on with another number of processes
        accelerator.register_save_state_pre_hook(self._unwrap_weights)
        accelerator.register_load_state_pre_hook(self._unwrap_models)

    def folders(self) -> list[Path]:
        """Of the checkpoints, newest first."""
        return sorted(self.directory.glob("step-*"), reverse=True)

    def save(self, step: int, seconds: float, config: DistillConfig) -> None:
        """Writes a checkpoint and deletes all but the last two.

        Args:
            step: Optimizer steps done.
            seconds: Spent on them, interrupted parts included.
            config: Settings of the run.
        """
        accelerator, unfinished = self._accelerator, self.directory / _UNFINISHED
        if accelerator.is_main_process and unfinished.exists():
            shutil.rmtree(unfinished)  # of a run that was killed while it saved
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        run = {"step": step, "seconds": seconds, "settings": config.to_dict(), "recordings": self._manifest}
        (unfinished / _RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            to_disk(path)
        unfinished.rename(self.directory / f"step-{step:09d}")
        to_disk(self.directory)
        for folder in self.folders()[_KEPT:]:
            shutil.rmtree(folder)

    def restore(self, config: DistillConfig) -> tuple[int, float]:
        """Loads the newest checkpoint into what the accelerator prepared.

        Returns:
            Optimizer steps done, and seconds spent on them.

        Raises:
            ConfigError: the checkpoint is damaged, or of a run with other settings or on other recordings.
        """
        folder = self.folders()[0]
        try:
            run = json.loads((folder / _RUN).read_text(encoding="utf-8"))
            step, seconds, settings = int(run["step"]), float(run["seconds"]), dict(run["settings"])
            recordings = dict(run.get("recordings", self._manifest))  # earlier versions did not keep it
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        # How often it saves and validates may change; everything else would make it another training.
        changed = differences({**settings, **{name: getattr(config, name) for name in _CADENCE}}, config.to_dict())
        if changed:
            raise ConfigError(
                f"{folder} was trained with other settings ({'; '.join(changed)}): repeat them, or choose another "
                "directory."
            )
        changed = manifest_differences(recordings, self._manifest)
        if changed:
            raise ConfigError(
                f"{folder} was trained on recordings of another model, scheduler, call or data ({'; '.join(changed)}): "
                "repeat them, or choose another directory."
            )
        try:
            self._accelerator.load_state(str(folder))
        except Exception as error:  # what damaged tensors raise depends on where they are damaged
            raise self._damaged(error) from error
        return step, seconds

    def _damaged(self, error: Exception) -> ConfigError:
        newest, *older = self.folders()
        then = f"go on from {older[0].name}" if older else "start anew"
        return ConfigError(f"{newest} cannot be read ({error!r}): delete it to {then}.")

    def _unwrap_weights(self, models: list[nn.Module], weights: list[dict[str, Any]], _: str) -> None:
        weights[:] = [self._accelerator.unwrap_model(model).state_dict() for model in models]

    def _unwrap_models(self, models: list[nn.Module], _: str) -> None:
        models[:] = [self._accelerator.unwrap_model(model) for model in models]
