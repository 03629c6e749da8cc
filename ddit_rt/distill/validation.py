"""How good an adapter is on held-out data: single steps against the base model's, and whole pictures side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ..families import Family
from ..granularity import Adapter
from ..schedule import one_in
from ..trajectories import generate, limited_psnr
from .config import DistillConfig
from .objective import Student
from .recordings import Library
from .samples import draw

_SEED = 12345
_INITIAL, _EVERY = 4, 3  # full steps first, then one full step in so many
_DIRECT, _DELTA = ("band-split", "adapter"), ("delta", "adapter-delta")
_PATHS = {"direct": (_DIRECT,), "delta": (_DELTA,), "both": (_DIRECT, _DELTA)}


@dataclass
class Evaluation:
    """Mean squared distance to the base model on held-out trajectories.

    Attributes:
        loss: Of the trained adapter, per multiple.
        untrained: Of the fresh adapter (band-split), per multiple.
        forecast: Of the straight line through the last two full predictions, which takes no model run.
    """

    loss: dict[int, float]
    untrained: dict[int, float]
    forecast: float

    @property
    def gain_db(self) -> dict[int, float]:
        """How much closer than band-split the adapter is, in dB of mean squared distance."""
        return {k: _decibel(self.untrained[k], loss) for k, loss in self.loss.items()}

    @property
    def gain_over_forecast_db(self) -> dict[int, float]:
        """How much closer than the forecast it is. Below 0, its coarse steps are worth less than none."""
        return {k: _decibel(self.forecast, loss) for k, loss in self.loss.items()}

    def lines(self) -> list[str]:
        """A sentence for people per multiple."""
        return [
            f"held out, {k}p: {self.loss[k]:.4g}; band-split {self.untrained[k]:.4g} ({gain:+.1f} dB), "
            f"forecast {self.forecast:.4g} ({self.gain_over_forecast_db[k]:+.1f} dB)"
            for k, gain in self.gain_db.items()
        ]

    def values(self) -> dict[str, float]:
        """The numbers by the names that the log has for them."""
        return {
            f"{name}/{k}p": value
            for name, found in (
                ("held_out", self.loss),
                ("gain_db", self.gain_db),
                ("gain_over_forecast_db", self.gain_over_forecast_db),
            )
            for k, value in found.items()
        }


@torch.no_grad()
def evaluate(
    trained: Adapter,
    untrained: Adapter,
    recorded: Library,
    family: Family,
    transformer: nn.Module,
    config: DistillConfig,
    accelerator: Accelerator,
    batches: int,
) -> Evaluation:
    """Compares two adapters and the forecast on held-out trajectories, the same ones every time.

    Args:
        trained, untrained: The adapters; they are moved to the accelerator's device.
        recorded: Holds the trajectories.
        family: Of the transformer.
        transformer: The frozen base model.
        config: Settings of the training; samples are drawn as there, four in a batch, all with memory.
        accelerator: Gives the device and the precision.
        batches: To average over, per multiple.
    """
    dtype = next(transformer.parameters()).dtype
    losses: list[dict[int, float]] = []
    forecast = 0.0
    for adapter in (trained, untrained):
        student = Student(adapter.to(accelerator.device), family, transformer)
        losses.append({})
        for k in config.multiples:
            one = replace(config, multiples=(k,), batch=4, blank=0.0)
            total = forecast = 0.0  # the same batches for every k: the forecast does not depend on it
            for index in range(batches):
                generator = torch.Generator().manual_seed(index)
                batch = draw(recorded, recorded.held_out, family, adapter.spec.patch, one, generator)
                forecast += float((batch.forecast() - batch.target.prediction).square().mean()) / batches
                with student.coarse(k), accelerator.autocast():
                    total += float(student(batch.to(accelerator.device, dtype)))
            losses[-1][k] = total / batches
    return Evaluation(losses[0], losses[1], forecast)


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
    line = {"schedule": one_in(steps, _EVERY, adapter.spec.multiples[0], _INITIAL, tail=0), "coarse": "extrapolate"}
    ways: list[tuple[str, dict[str, Any]]] = [("forecast", line)]
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
            values[name].append(limited_psnr(frames, base))
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


def _decibel(reference: float, loss: float) -> float:
    return 10 * math.log10(max(reference, 1e-30) / max(loss, 1e-30))
