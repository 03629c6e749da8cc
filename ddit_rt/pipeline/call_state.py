"""The state of one pipeline call. It begins empty and ends with the call, so nothing leaks into the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import DDiTConfig
from ..granularity import Geometry, PredictionHistory
from ..runtime import CacheState, HostResults, PendingEvolution
from ..schedule import EvolutionHistory, Policy, StepRecord


class CallState:
    """Counts denoising steps and keeps what they need of each other.

    A step goes from its first transformer call to the end of its scheduler step.

    Attributes:
        index: Current step, from 0.
        steps: Denoising steps of this call; known from the first transformer call on.
        calls: Transformer calls made so far in the current step (guidance makes two).
        record: Record of the current step, None between steps.
        records: Finished steps.
        pending: The decision for the next step, under way.
        evolution: That of the current step, whose σ_k may still be under way.
        host: Where decisions arrive from a CUDA device.
        shape: Of the latent in canonical layout.
        cache_states: (transformer, call of the step, multiple) -> what TeaCache remembers.
        renewed: Transformers whose merged weights were renewed in this call, by id.
        skipped: TeaCache skipped the blocks of the latest model run.
        replayed: Everything in the current step came from captured graphs so far.
    """

    def __init__(self, config: DDiTConfig) -> None:
        self.index = 0
        self.steps = 0
        self.calls = 0
        self.history = EvolutionHistory(config.order)
        self.policy = Policy(config)
        self.record: StepRecord | None = None
        self.records: list[StepRecord] = []
        self.pending: PendingEvolution | None = None
        self.evolution: PendingEvolution | None = None
        self.host: HostResults | None = None
        self.geometry: Geometry | None = None
        self.shape: torch.Size | None = None
        self.cache_states: dict[tuple[int, int, int], CacheState] = {}
        self.renewed: set[int] = set()
        self.skipped = False
        self.replayed = True
        self.stop: Callable[[], Callable[[], float]] | None = None
        self._sigmas: list[float] = []
        self._timesteps: list[float] = []
        self._levels: torch.Tensor | None = None
        self._trajectories: dict[tuple[int, int], PredictionHistory] = {}

    def read_timesteps(self, scheduler: Any) -> None:
        """Takes σ and timesteps of the steps to come; image-to-image begins in the middle."""
        begin = scheduler.begin_index or 0
        self._sigmas = [float(sigma) for sigma in scheduler.sigmas[begin:].tolist()]
        self._timesteps = [float(t) for t in scheduler.timesteps[begin:].tolist()]
        self.steps = self.policy.steps = len(self._timesteps)

    @property
    def sigma(self) -> float:
        return self._sigmas[self.index]

    def level(self, device: torch.device) -> torch.Tensor:
        """σ of the current step where the latents are, a 0-dim tensor: a captured graph can take it as an input."""
        if self._levels is None or self._levels.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._levels = torch.tensor(self._sigmas, dtype=dtype, device=device)
        return self._levels[self.index]

    @property
    def timestep(self) -> float:
        return self._timesteps[self.index]

    def trajectory(self, module: nn.Module, ordinal: int) -> PredictionHistory:
        """Memory of the ``ordinal``-th call per step of ``module``."""
        return self._trajectories.setdefault((id(module), ordinal), PredictionHistory())

    def forget(self, shape: torch.Size) -> None:
        """Starts the evolution anew: the latent has another shape than before."""
        self.shape = shape
        self.pending = self.evolution = self.host = None
        self.history.clear()
        self.cache_states.clear()
        self._trajectories.clear()

    def end_step(self) -> None:
        """Closes the current step's record. Its σ_k are long there: they were launched before its model run."""
        assert self.record is not None and self.stop is not None
        if self.evolution is not None:
            self.record.patch_std = self.evolution.wait()
            if any(sigma != sigma for sigma in self.record.patch_std.values()):
                self.record.note = "the latent is not finite (NaN or Inf)"
        self.evolution = None
        self.record.elapsed = self.stop()
        self.records.append(self.record)
        self.record = None
        self.replayed = True
        self.index += 1
        self.calls = 0
