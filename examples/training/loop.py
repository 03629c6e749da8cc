"""What every training stage shares: budget, log, atomic checkpoints and one resumable loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


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
        """Append a record, in the first process; floats are rounded to 5 significant digits."""
        if of_processes()[0] > 0:
            return
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
    """The random numbers of one step in this process: a resumed run draws what an uninterrupted one would have."""
    rank, processes = of_processes()
    return torch.Generator().manual_seed(seed * 1_000_003 + step * processes + rank)


def of_processes() -> tuple[int, int]:
    """Which process of a training this is, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass
class Loop:
    """One stage's resumable training: `loss(step, progress)` returns the loss to back-propagate.

    Several processes average their gradients; the first of them keeps the time, the log and the checkpoint.
    """

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
        first = of_processes()[0] == 0
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
            progress = _agreed(self.budget.progress(step, seconds))
            done = progress >= 1 or step == stop_after
            if recent and first and (done or now - logged > 15):
                self.log.write(
                    self.stage, step=step, minutes=seconds / 60, loss=torch.stack(recent).mean().item(),
                    seconds_per_step=(now - logged) / len(recent), progress=progress,
                )  # fmt: skip
                recent, logged = [], now
            if first and (done or now - saved > self.checkpoint_seconds):
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
            _average_gradients(self.module)
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


def _agreed(value: float) -> float:
    """A number as the first process has it."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def _average_gradients(module: torch.nn.Module) -> None:
    """Means of all processes' gradients, in one exchange."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for gradient, mean in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """An exponential moving average for `AveragedModel` whose decay rises to `decay` over the first steps."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        steps = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return update
