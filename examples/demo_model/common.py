"""What every training stage of the demo model shares: budget, log, atomic checkpoints and one resumable loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


@dataclass(frozen=True)
class Sizes:
    """Everything that sets the cost of a run; `Sizes.tiny()` is the seconds-long one of the tests."""

    resolutions: tuple[int, ...] = (128, 64, 32)
    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_pictures: int = 4000
    vae_batch: int = 20
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 24
    text_batch: int = 192
    width_heads: int = 4
    head_dim: int = 48
    rope: tuple[int, int, int] = (4, 22, 22)
    double_layers: int = 2
    single_layers: int = 6
    shard_scenes: int = 1000
    scenes: int = 24000
    captions: int = 4
    reader_channels: tuple[int, int, int] = (24, 48, 72)
    reader_scenes: int = 12000
    reader_batch: int = 32
    reader_held_out: int = 1000
    # Scenes per step at each resolution, and how often a step takes it: until the first of `phases` (a share of the
    # budget) and after it. Low resolutions are cheap and carry the meaning; some stay in the mix to the end.
    dit_batch: tuple[int, ...] = (24, 56, 112)
    phases: tuple[tuple[float, tuple[float, ...]], ...] = (
        (0.12, (0.1, 0.6, 0.3)),
        (0.55, (0.62, 0.28, 0.1)),
        (1.0, (0.8, 0.13, 0.07)),
    )

    @staticmethod
    def large() -> Sizes:
        """256 pixels, 1,024 tokens: for going on from a trained model, whose sizes are the two coarse grids here."""
        return Sizes(
            resolutions=(256, 128, 64), scenes=12000, dit_batch=(8, 24, 64),
            phases=((0.5, (0.74, 0.17, 0.09)), (1.0, (0.82, 0.12, 0.06))),
        )  # fmt: skip

    @staticmethod
    def tiny() -> Sizes:
        """A model of a few thousand parameters: exercises every line, learns nothing."""
        return Sizes(
            resolutions=(32, 16), vae_channels=(8, 8, 16), vae_pictures=16, vae_batch=4, text_width=16, text_layers=1,
            text_tokens=24, text_batch=8, width_heads=2, head_dim=16, rope=(4, 6, 6), double_layers=1, single_layers=1,
            shard_scenes=8, scenes=16, captions=2, reader_channels=(4, 4, 8), reader_scenes=16,
            reader_batch=4, reader_held_out=8, dit_batch=(2, 4), phases=((0.3, (0.0, 1.0)), (1.0, (0.7, 0.3))),
        )  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: wall-clock minutes of training, or optimizer steps (exactly repeatable)."""

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError(f"a budget is minutes or steps, got minutes={self.minutes} and steps={self.steps}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent, 0 to 1 (and beyond)."""
        return step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 1e-9))


@dataclass
class RunLog:
    """Appends one JSON object a line to `path`."""

    path: Path

    def write(self, stage: str, **values: Any) -> None:
        """Append a record; floats are rounded to 5 significant digits."""
        short = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, **short}) + "\n")
        print(stage, short, flush=True)


def save_atomic(path: Path, state: Any) -> None:
    """`torch.save` through a temporary file, so that a kill never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path, hint: str) -> Any:
    """Load what `save_atomic` wrote; `hint` says how to make a missing file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    return torch.load(path, map_location="cpu", weights_only=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: a resumed run draws what an uninterrupted one would have."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@dataclass
class Loop:
    """One stage's resumable training: `loss(step, progress)` returns the loss to back-propagate."""

    stage: str
    module: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    budget: Budget
    checkpoint: Path
    log: RunLog
    lr_warmup_steps: int = 100
    decay_from: float = 0.3
    clip: float = 1.0
    ema: float | None = None
    checkpoint_seconds: float = 120.0
    averaged: AveragedModel | None = None

    def run(self, loss: Callable[[int, float], torch.Tensor], resume: bool, stop_after: int | None = None) -> None:
        """Train until the budget is spent, or until step `stop_after` (as a kill right after a checkpoint would)."""
        base = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        step, before = 0, 0.0
        if self.ema is not None:
            self.averaged = AveragedModel(self.module, multi_avg_fn=_moving_average(self.ema))
            # the weights that the run begins with count as the first of the average
            self.averaged.n_averaged.fill_(1)
        if resume and self.checkpoint.exists():
            step, before = self._restore()
        start = saved = logged = time.monotonic()
        recent: list[torch.Tensor] = []
        while True:
            now = time.monotonic()
            seconds = before + now - start
            progress = self.budget.progress(step, seconds)
            done = progress >= 1 or step == stop_after
            if recent and (done or now - logged > 15):
                self.log.write(
                    self.stage, step=step, minutes=seconds / 60, loss=torch.stack(recent).mean().item(),
                    seconds_per_step=(now - logged) / len(recent), progress=progress,
                )  # fmt: skip
                recent, logged = [], now
            if done or now - saved > self.checkpoint_seconds:
                self._save(step, seconds)
                saved = now
            if done:
                return
            factor = min(1.0, (step + 1) / self.lr_warmup_steps) * min(1.0, (1 - progress) / (1 - self.decay_from))
            for optimizer, rates in zip(self.optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            value = loss(step, progress)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if self.averaged is not None:
                self.averaged.update_parameters(self.module)
            recent.append(value.detach())

    def _save(self, step: int, seconds: float) -> None:
        save_atomic(
            self.checkpoint,
            {
                "step": step,
                "seconds": seconds,
                "module": self.module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "averaged": {} if self.averaged is None else self.averaged.module.state_dict(),
            },
        )

    def _restore(self) -> tuple[int, float]:
        state = load_state(self.checkpoint, f"train the {self.stage} stage first")
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.averaged is not None:
            self.averaged.module.load_state_dict(state["averaged"])
            self.averaged.n_averaged.fill_(1 + state["step"])
        return state["step"], state["seconds"]


def _moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """An exponential moving average for `AveragedModel` whose decay rises to `decay` over the first steps."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        steps = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return update
