"""Writing a trained run as a diffusers pipeline, and beginning a run from one."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ddit_rt.evaluate import PSNR_LIMIT

from .denoiser import CHECKPOINT, START
from .loop import save_atomic

VAE, TEXT = "vae_final.pt", "text_final.pt"
"""Files of a run: the trained autoencoder and text encoders."""


def write(pipe: DiffusionPipeline, demo: Mapping[str, Any], target: Path) -> None:
    """Writes a pipeline as float16 to `target`, replacing what is there.

    Args:
        pipe: With the run's weights.
        demo: Content of its demo.json: how it is called, and prompts.
        target: Folder.
    """
    fresh = target.with_name(target.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(str(fresh))
    # transformers 5 calls the class TokenizersBackend and keeps the old name, which every version knows.
    for path in (fresh / "model_index.json", *fresh.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (fresh / "demo.json").write_text(json.dumps(demo, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)  # written readable by the owner alone, which an installed package must not be


def begin_from(run: Path, vae: Mapping[str, Any], text: Any, transformer: Mapping[str, Any]) -> None:
    """The inverse of :func:`write`: gives an empty run folder an exported pipeline's weights to train on from.

    float16 to float32; optimizers and the average begin anew.

    Args:
        run: Folder of a run.
        vae, text, transformer: Contents of its files.

    Raises:
        FileExistsError: the run has such a file already; none is ever replaced.
    """
    states = {VAE: vae, TEXT: text, START: transformer}
    taken = [name for name in (*states, CHECKPOINT) if (run / name).exists()]
    if taken:
        raise FileExistsError(f"{run} has {', '.join(taken)} already: give --start-from an empty run folder")
    for name, state in states.items():
        save_atomic(run / name, state)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays, bounded: an untrained model's may be the same."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return PSNR_LIMIT if error == 0 else min(10 * math.log10(255**2 / error), PSNR_LIMIT)
