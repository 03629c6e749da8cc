"""Metrics of saved pictures, by models that judge them: FID, CLIP score, ImageReward, adherence on the demo model.

All but adherence take weights of their own from the net once. Where they cannot be had, the loader says so and the
evaluation goes on without. Protocol: FID on 2048 Inception features (torchmetrics), CLIP score as the raw cosine,
ImageReward 1.5's score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .adherence import adherence
from .metrics import Judge
from .unavailable import unavailable

CLIP_MODEL = "openai/clip-vit-large-patch14"


def read_pictures(paths: Sequence[Path]) -> torch.Tensor:
    """Picture files of one size as uint8 (N, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths])


def fid(feature: int | torch.nn.Module = 2048, batch: int = 32) -> Judge:
    """Loads the Fréchet distance to the base model's pictures.

    Args:
        feature: Width of the Inception layer, or a module (N, 3, H, W) uint8 -> (N, d), d being its ``num_features``.
        batch: Pictures at a time.

    Raises:
        MetricUnavailableError: torch-fidelity or the Inception weights are missing.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=feature)
    except Exception as error:
        raise unavailable("FID", "torch-fidelity and its Inception weights", error) from error

    def judge(pictures: Sequence[Path], base: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        if len(pictures) < 2:  # a covariance needs two
            return []
        metric.reset()
        for files, real in ((base, True), (pictures, False)):
            for start in range(0, len(files), batch):
                metric.update(read_pictures(files[start : start + batch]), real=real)
        return [float(metric.compute())]

    return judge


def clip_score(model: str = CLIP_MODEL, batch: int = 16) -> Judge:
    """Loads the CLIP score: mean cosine of picture and prompt.

    Raises:
        MetricUnavailableError: the CLIP weights are missing.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore

        make: Any = CLIPScore
        metric = make(model_name_or_path=model)
    except Exception as error:
        raise unavailable("CLIP score", f"the weights of {model}", error) from error

    def judge(pictures: Sequence[Path], base: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        metric.reset()
        for start in range(0, len(pictures), batch):
            metric.update(read_pictures(pictures[start : start + batch]), list(prompts[start : start + batch]))
        return [float(metric.compute()) / 100]  # torchmetrics scales the cosine

    return judge


def image_reward(model: str = "ImageReward-v1.0") -> Judge:
    """Loads ImageReward: its normalised score.

    Raises:
        MetricUnavailableError: image-reward or its weights are missing.
    """
    try:
        import ImageReward

        loaded = ImageReward.load(model)
    except Exception as error:
        raise unavailable("ImageReward", "the package image-reward and its weights", error) from error

    def judge(pictures: Sequence[Path], base: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        return [float(loaded.score(prompt, str(path))) for prompt, path in zip(prompts, pictures, strict=True)]

    return judge


JUDGES: dict[str, Callable[[], Judge]] = {
    "fid": fid,
    "clip": clip_score,
    "imagereward": image_reward,
    "adherence": adherence,
}
"""Name -> loader."""
