"""The state of one pipeline call. It begins empty and ends with the call, so nothing leaks into the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import SKIP, DDiTConfig
from ..families import Family, ModelInputs
from ..granularity import Geometry, PredictionHistory
from ..runtime import CacheState, stopwatch
from ..schedule import EvolutionHistory, HostResults, PendingEvolution, Policy, Spacing, StepRecord, StepView
from .transformer_call import StepResult


class CallState:
    """Counts denoising steps and keeps what they need of each other.

    A step goes from its first transformer call to the end of its scheduler step.

    Args:
        config: Settings.
        policy: Chooses the multiples.
        caller: Of the call: the pipeline, and the identity of its ``__call__``'s frame; see
            :func:`~ddit_rt.pipeline.caller.calling_pipeline`.

    Attributes:
        index: Current step, from 0.
        steps: Denoising steps of this call; known from the first transformer call on.
        calls: Transformer calls made so far in the current step (guidance makes two).
        record: Of the current step, None between steps.
        records: Of finished steps.
        cache_states: (transformer, call of the step, multiple) -> what TeaCache remembers.
        updates: How often the pipeline's progress bar was moved on; None until it is there.
    """

    def __init__(self, config: DDiTConfig, policy: Policy, caller: tuple[Any, int]) -> None:
        self.caller = caller
        self.index = 0
        self.steps = 0
        self.calls = 0
        self.record: StepRecord | None = None
        self.records: list[StepRecord] = []
        self.cache_states: dict[tuple[int, int, int], CacheState] = {}
        self.updates: int | None = None
        self._config = config
        self._policy = policy
        self._spacing = Spacing()
        self._history = EvolutionHistory(config.order)
        self._pending: PendingEvolution | None = None
        self._evolution: PendingEvolution | None = None
        self._host: HostResults | None = None
        self._geometry: Geometry | None = None
        self._shape: torch.Size | None = None
        self._replayed = True
        self._updated_every_step = False
        self._stop: Callable[[], Callable[[], float]] | None = None
        self._begin: int | None = 0
        self._sigmas: list[float] = []
        self._timesteps: list[float] = []
        self._levels: torch.Tensor | None = None
        self._histories: dict[tuple[int, int], PredictionHistory] = {}

    # -- where the call is ----------------------------------------------------------------------------------------

    def start(self, scheduler: Any, family: Family, time: torch.Tensor) -> str:
        """Takes σ and timesteps of the steps to come.

        Args:
            scheduler: With the call's timesteps set.
            family: Of the transformer.
            time: The transformer's first timestep argument. It says where a call begins that runs the last of the
                scheduler's timesteps only, as image- and video-to-video do, whether or not they tell the scheduler.

        Returns:
            Why no step of the call can be coarse; empty if they can.

        Raises:
            ScheduleError: the policy cannot serve so many steps.
        """
        timesteps, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
        begin = scheduler.begin_index or 0
        value, precision = _value(time)
        fits = [i for i, t in enumerate(timesteps) if _same(value, _argument(family, t), precision)]
        if begin not in fits:
            begin = fits[0] if len(fits) == 1 and scheduler.begin_index is None else None
        self._begin = begin
        if begin is None:
            self.steps = len(timesteps)
            return f"the scheduler has no timestep for the transformer's {value:g}"
        self._timesteps = [float(t) for t in timesteps[begin:]]
        self._sigmas = [float(sigma) for sigma in sigmas[begin:]]
        self.steps = len(self._timesteps)
        self._policy.start(self.steps)
        return ""

    def unfit(self, family: Family, time: torch.Tensor) -> str:
        """Why a transformer call that would begin the next step is none of the pipeline's steps; empty if it is one.

        A callback, say, may call the transformer between two steps. Where the progress bar is moved on after every
        step, as most pipelines do, nothing but a callback comes before that; elsewhere the timestep has to be the one
        that is due, which on a CUDA device costs a wait.
        """
        if self._begin is None:
            return "where in the schedule this call is cannot be told"
        if self.index >= self.steps:
            return "the call's last step is over"
        if self.index == 0:
            return ""
        if self.updates is not None and self.updates >= self.index:
            self._updated_every_step = True
            return ""
        if self._updated_every_step:
            return "a call of the transformer between two steps"
        value, precision = _value(time)
        due = _argument(family, self._timesteps[self.index])
        return "" if _same(value, due, precision) else f"timestep {value:g} came where {due:g} was due"

    @property
    def sigma(self) -> float:
        """Noise level of the current step; NaN where it cannot be told."""
        return self._sigmas[self.index] if self.index < len(self._timesteps) else float("nan")

    def level(self, device: torch.device) -> torch.Tensor:
        """σ of the current step where the latents are, a 0-dim tensor."""
        if self._levels is None or self._levels.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._levels = torch.tensor(self._sigmas or [float("nan")], dtype=dtype, device=device)
        return self._levels[min(self.index, len(self._levels) - 1)]

    def history(self, module: nn.Module, ordinal: int) -> PredictionHistory:
        """Memory of the ``ordinal``-th call per step of ``module``."""
        key = (id(module), ordinal)
        found = self._histories.get(key)
        if found is None:
            found = self._histories[key] = PredictionHistory()
        return found

    # -- a step ---------------------------------------------------------------------------------------------------

    def see_shape(self, inputs: ModelInputs | None) -> None:
        """Starts the evolution anew where the latent has another shape than before."""
        if inputs is None or self._shape == inputs.latent.shape:
            return
        self._shape, self._geometry = inputs.latent.shape, inputs.geometry
        self._pending = self._evolution = self._host = None
        self._history.clear()
        self.cache_states.clear()
        self._histories.clear()

    def choose(self, must_be_full: bool, can_skip: bool) -> int:
        """The multiple of the step that begins, 0 to skip it."""
        self._evolution, self._pending = self._pending, None
        index, spacing = self.index, self._spacing
        multiple = 1
        # outside the scheduler's timesteps there is nothing to choose
        if index < len(self._timesteps):
            coarse, skipped = spacing.consecutive_coarse, spacing.consecutive_skipped
            view = StepView(index, self.steps, self._sigmas[index], coarse, skipped, can_skip, self._evolution)
            multiple = self._policy.choose(view)
        if must_be_full or (multiple == SKIP and not can_skip):
            multiple = 1
        spacing.add(multiple)
        return multiple

    def begin_step(self, multiple: int, inputs: ModelInputs | None, executed: str, note: str) -> None:
        """Opens the record of the current step."""
        known = self.index < len(self._timesteps)
        self.record = StepRecord(
            index=self.index,
            timestep=self._timesteps[self.index] if known else float("nan"),
            sigma=self._sigmas[self.index] if known else float("nan"),
            multiple=multiple,
            tokens=inputs.geometry.tokens(multiple) if inputs is not None and multiple != SKIP else 0,
            executed=executed,
            note=note,
        )
        self._stop = stopwatch(inputs.latent.device if inputs is not None else torch.device("cpu"))

    def add(self, result: StepResult) -> None:
        """Takes a transformer call's result into the record.

        A run whose blocks were skipped counts as nothing: embedding and output are a thousandth of it.
        """
        record = self.record
        assert record is not None
        self._replayed &= result.replayed
        if result.blocks_skipped:
            record.executed = "cached" if not record.flops else record.executed
        elif result.ran_model and result.full_flops:
            record.executed = "graph" if self._replayed else "eager"
        record.flops += result.flops
        record.full_flops += result.full_flops

    def end_step(self, increment: torch.Tensor | None, family: Family) -> None:
        """Closes the current step's record, and starts the decision for the next one.

        Its σ_k are long there: they were launched before its model run.

        Args:
            increment: Of the latent, float32; None if the evolution is not watched.
            family: Of the transformer; knows whether the scheduler steps packed tokens.
        """
        record = self.record
        assert record is not None and self._stop is not None
        if self._evolution is not None:
            record.patch_std = dict(self._evolution.wait())
            if any(sigma != sigma for sigma in record.patch_std.values()):
                record.note = "the latent is not finite (NaN or Inf)"
        self._evolution = None
        record.elapsed = self._stop()
        self.records.append(record)
        self.record = None
        self._replayed = True
        self.index += 1
        self.calls = 0
        if increment is None:
            return
        self._history.push(increment)
        if self.index < self.steps and self._history.full and self._geometry is not None:
            self._launch(self._geometry, family)

    def _launch(self, geometry: Geometry, family: Family) -> None:
        increments, config = self._history.increments, self._config
        if increments[0].is_cuda and self._host is None:
            self._host = HostResults(increments[0].shape[0], len(config.multiples))
        self._pending = PendingEvolution(
            increments,
            config.multiples,
            geometry.patch,
            config.quantile,
            family.packing(geometry) if increments[0].ndim == 3 else None,
            config.backend,
            config.threshold,
            self._host,
        )


def _value(time: torch.Tensor) -> tuple[float, float]:
    """A timestep argument as a number, and the relative precision of its dtype."""
    precision = torch.finfo(time.dtype).eps if time.is_floating_point() else 0.0
    return float(time.flatten()[0]), precision


def _argument(family: Family, timestep: float) -> float:
    """What the transformer is given for one of the scheduler's timesteps."""
    return timestep / 1000 * family.time_scale


def _same(value: float, due: float, precision: float) -> bool:
    # pipelines round the timestep to the model's dtype before and after scaling it
    return abs(value - due) <= (2 * precision + 1e-6) * abs(due) + 1e-6
