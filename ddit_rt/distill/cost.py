"""What a run will cost, from a few steps of it on this machine."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .config import DistillConfig
from .data import Source
from .optimization import optimizer_name
from .recordings import GROUP, Library
from .samples import draw
from .trainer import Trainer

_STEPS = 3


@dataclass
class Estimate:
    """Measured on a few steps, extrapolated to the whole run on one device of this kind.

    Attributes:
        parameters: Trained.
        adapter_bytes, checkpoint_bytes, recording_bytes: On disk; the last two checkpoints are kept.
        memory_bytes: Peak of the device (of the process, on a CPU).
        record_seconds: For all recordings.
        train_seconds: For all steps.
        validate_seconds: For all validations.
    """

    parameters: int
    adapter_bytes: int
    checkpoint_bytes: int
    recording_bytes: int
    memory_bytes: int
    record_seconds: float
    train_seconds: float
    validate_seconds: float

    @property
    def hours(self) -> float:
        return (self.record_seconds + self.train_seconds + self.validate_seconds) / 3600

    def __str__(self) -> str:
        return "\n".join(
            (
                f"trained parameters   {self.parameters / 1e6:.2f} M",
                f"adapter file         {_size(self.adapter_bytes)}, two checkpoints of {_size(self.checkpoint_bytes)}",
                f"recordings           {_size(self.recording_bytes)}",
                f"peak memory          {_size(self.memory_bytes)} (measured)",
                f"recording            {_hours(self.record_seconds)} (estimated from {_STEPS} denoising steps)",
                f"training             {_hours(self.train_seconds)} (estimated from one step per size)",
                f"validation           {_hours(self.validate_seconds)} (estimated)",
                f"together             {_hours(3600 * self.hours)} on one device",
            )
        )


def estimate(
    pipe: Any, source: Source, call: Mapping[str, Any] | Sequence[Mapping[str, Any]], config: DistillConfig
) -> Estimate:
    """Records a few denoising steps and takes one training step per size; leaves nothing behind.

    Args:
        pipe, source, call, config: As for :class:`ddit_rt.distill.Trainer`; of several calls the first is measured.
    """
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(pipe, source, call, replace(config, fill=1.0), Path(directory), log=lambda _: None)
        transformer, device = trainer.transformer, trainer.accelerator.device
        call = trainer.calls[0]
        total = int(call.get("num_inference_steps", 50))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        items = len(source.captions)
        group = list(range(min(GROUP, items)))
        began = time.perf_counter()
        recording = source.record(pipe, trainer.family, call, group, config.seed, _STEPS)
        base_step = (time.perf_counter() - began) / len(recording.latents)
        steps = total if source.describe()["kind"] == "prompts" else int(source.describe()["steps"])
        library = Library(Path(directory) / "probe", lambda _: recording, 1, 0, {}, trainer.recorded.dtype)
        library.shard(0)
        shard_bytes = library.path(0).stat().st_size * steps / len(recording.latents)
        adapter = trainer.adapter.to(device)
        seconds = []
        for k in config.multiples:
            one = replace(config, multiples=(k,), blank=0.0)
            generator = torch.Generator().manual_seed(0)
            batch = draw(library, (0,), trainer.family, adapter.spec.patch, one, generator)
            batch = batch.to(device, next(transformer.parameters()).dtype)
            seconds.append(min(trainer.timed(batch) for _ in range(2)))
        parameters = sum(parameter.numel() for parameter in adapter.parameters())
        groups = math.ceil(items / GROUP)
        runs = 2 + (4 if config.objective == "both" else 2) * len(config.multiples)
        sheet = 4 * runs * total * base_step / len(group)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Estimate(
            parameters=parameters,
            adapter_bytes=2 * parameters,
            checkpoint_bytes=4 * parameters * (6 if optimizer_name(config, trainer.family) == "prodigy" else 4),
            recording_bytes=int(shard_bytes * groups),
            memory_bytes=memory,
            record_seconds=groups * steps * base_step,
            train_seconds=config.steps * config.accumulate * sum(seconds) / len(seconds),
            validate_seconds=math.ceil(config.steps / config.validate_every) * sheet,
        )


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
