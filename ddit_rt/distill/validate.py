"""Held-out prompts through the real pipeline: plain, forecast, band-split, and the adapter, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..granularity import Adapter
from ..schedule import one_in
from ..trajectories import generate, psnr

_SEED = 12345
_INITIAL, _EVERY = 4, 3  # full steps first, then one full step in so many
_DIRECT, _DELTA = ("band-split", "adapter"), ("delta", "adapter-delta")
_PATHS = {"direct": (_DIRECT,), "delta": (_DELTA,), "both": (_DIRECT, _DELTA)}


def pictures(
    pipe: Any,
    adapter: Adapter,
    call: Mapping[str, Any],
    captions: Sequence[str],
    path: Path,
    objective: str,
    count: int = 4,
) -> dict[str, float]:
    """Writes a sheet, a row per prompt: base, forecast, then untrained and trained per multiple; and measures it.

    Args:
        pipe: A plain pipeline; it is left plain.
        adapter: To judge.
        call: Arguments of the pipeline.
        captions: Held-out prompts, of which ``count`` are drawn.
        objective: See :class:`ddit_rt.distill.DistillConfig`; decides which paths are shown.
        path: Of the picture.

    Returns:
        ``psnr_db/forecast``, ``psnr_db/<way>@<multiple>p`` -> mean PSNR to the base model's own pictures. Empty,
        without a picture, for a pipeline without a decoder.
    """
    if getattr(pipe, "vae", None) is None:
        return {}
    steps = int(call.get("num_inference_steps", 50))
    free = {"schedule": one_in(steps, _EVERY, adapter.spec.multiples[0], _INITIAL, tail=0), "coarse": "extrapolate"}
    ways: list[tuple[str, dict[str, Any]]] = [("forecast", free)]
    for k in adapter.spec.multiples:
        plan = {"schedule": one_in(steps, _EVERY, k, _INITIAL, tail=0), "multiples": (1, k)}
        for untrained, trained in _PATHS[objective]:
            ways.append((f"{untrained}@{k}p", {**plan, "coarse": untrained}))
            ways.append((f"{trained}@{k}p", {**plan, "adapter": adapter, "coarse": trained}))
    values: dict[str, list[float]] = {name: [] for name, _ in ways}
    rows = []
    for index, caption in enumerate(captions[:count]):
        base = generate(pipe, None, _SEED + index, prompt=caption, **call).frames
        row = [base]
        for name, settings in ways:
            frames = generate(pipe, settings, _SEED + index, prompt=caption, **call).frames
            values[name].append(psnr(frames, base))
            row.append(frames)
        rows.append(torch.cat([_still(frames) for frames in row], dim=2))
    sheet = torch.cat(rows, dim=1).mul(255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
    return {f"psnr_db/{name}": sum(found) / len(found) for name, found in values.items()}


def _still(frames: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W), or the middle of (1, F, 3, H, W), as (3, H, W)."""
    first = frames[0]
    return (first if first.ndim == 3 else first[len(first) // 2]).clamp(0, 1)
