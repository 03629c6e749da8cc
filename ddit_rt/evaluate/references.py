"""The converged pictures of a sweep, made once and kept in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..trajectories import generate_converged

FOLDER = "converged"
_KEY = "frames"


class ConvergedPictures:
    """Runs a pipeline to convergence where that was not done before.

    They are kept in float16, whose rounding lies 77 dB away from the picture: far below what any method leaves, and
    unlike the 59 dB of a picture file.

    Args:
        folder: Of the sweep.
        pipe: The pipeline; left plain.
    """

    def __init__(self, folder: Path, pipe: Any) -> None:
        self._folder, self._pipe = folder / FOLDER, pipe

    def get(self, prompt: int, seed: int, noise: int, call: Mapping[str, Any]) -> torch.Tensor:
        """Frames as in :class:`~ddit_rt.trajectories.Outcome`, float32.

        Args:
            prompt, seed: Which picture of the sweep.
            noise: Seed of its noise.
            call: Arguments of the pipeline, of the plain run.

        Raises:
            ConfigError: the pipeline's scheduler adds noise or predicts no flow.
        """
        path = self._folder / f"{prompt:04d}-{seed}.safetensors"
        if path.is_file():
            try:
                return load_file(path)[_KEY].float()
            except SafetensorError:  # cut short, and made again
                path.unlink()
        frames = generate_converged(self._pipe, noise, **call).frames.half()
        path.parent.mkdir(parents=True, exist_ok=True)
        # a kill in mid-write leaves the other name behind
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file({_KEY: frames.contiguous()}, unfinished)
        os.replace(unfinished, path)
        # what is kept, so that a resumed sweep compares with the very same
        return frames.float()
