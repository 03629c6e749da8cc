"""The state of one pipeline call. It begins empty and ends with the call, so nothing leaks into the next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import DDiTConfig
from ..errors import ScheduleError
from ..families import Family, ModelInputs
from ..granularity import CoarsePath, Geometry, PredictionHistory, VariancePreserving
from ..multiples import SKIP, side_of
from ..runtime import CacheState, agree_on_multiple
from ..schedule import Evolution, FlowSolver, LatentEvolution, Policy, Ran, Spacing, StepRecord, StepView, levels_of
from .coarse_weights import unread_loras
from .guidance import BatchedGuidance
from .modulation import ModulationAhead
from .process import process_of
from .transformer_call import PromptText, StepResult


class CallState:
    """Counts denoising steps and keeps what they need of each other.

    A step goes from its first transformer call to the end of its scheduler step.

    Args:
        config: Settings.
        policy: Chooses the multiples.
        path: What coarse steps compute.
        caller: Of the call: the pipeline, and the identity of its ``__call__``'s frame.

    Attributes:
        index: Current step, from 0.
        steps: Denoising steps of this call; known from the first transformer call on.
        calls: Transformer calls made so far in the current step (guidance makes two).
        record: Of the current step, None between steps.
        records: Of finished steps.
        remembers: Later steps may need what this one predicts.
        cache_states: (transformer, call of the step, multiple) -> what TeaCache remembers.
        bar: The pipeline's progress bar; None until it is there.
        solver: Moves the latent; None leaves that to the scheduler.
        companion_solver: The same for the latent of a second output, which another scheduler steps.
        obstacle: Why all steps have to be full, if so.
        stepped: Index, origin and source of the last step that ended; None before.
        policy: As given.
        ahead: Modulations of the call's steps; None leaves them to the transformer.
        text: Of the prompts, if coarse steps are to keep no more; else None.
        guidance: Runs a step's two calls as one; None runs each by itself.
        process: Of the call's latents; None for a flow's.
        layout: Geometry of the latent, None before the first step, how the scheduler's tokens are packed, and the
            latent of the first step, which holds the frames that are given.
        source: What the current step's prediction comes from: the transformer, by id, the latents' shape, which tells
            whether guidance doubles the batch, and how many calls there are.
    """

    def __init__(self, config: DDiTConfig, policy: Policy, path: CoarsePath, caller: tuple[Any, int]) -> None:
        self.caller = caller
        self.index = 0
        self.steps = 0
        self.calls = 0
        self.record: StepRecord | None = None
        self.records: list[StepRecord] = []
        self._may_coarsen = config.approximates
        self.remembers = self._may_coarsen
        self.cache_states: dict[tuple[int, int, int], CacheState] = {}
        self.bar: CallBar | None = None
        self.solver: FlowSolver | None = None
        self.companion_solver: FlowSolver | None = None
        self.obstacle = ""
        self.stepped: tuple[int, Ran, Hashable] | None = None
        self._config = config
        self.policy = policy
        self.ahead: ModulationAhead | None = None
        self.text: PromptText | None = None
        self.guidance: BatchedGuidance | None = None
        self._path = path
        self._spacing = Spacing()
        self._base = 0
        self._evolution = LatentEvolution(
            config.order, config.multiples, config.quantile, config.backend, config.threshold
        )
        self._patch: int | None = None
        self._packed: tuple[int, ...] | None = None
        self.layout: tuple[Geometry | None, tuple[int, ...] | None, torch.Tensor | None] = None, None, None
        self._shape: torch.Size | None = None
        self._replayed = True
        self._updated_every_step = False
        self._stop: Callable[[], Callable[[], float]] | None = None
        self._unplaced = ""
        self._stray = ""
        self._sigmas: list[float] = []
        self._timesteps: list[float] = []
        self._levels: torch.Tensor | None = None
        self.process: VariancePreserving | None = None
        self._histories: dict[tuple[int, int], PredictionHistory] = {}

    # -- where the call is ----------------------------------------------------------------------------------------

    def start(self, scheduler: Any, family: Family, given: torch.Tensor) -> None:
        """Takes σ and timesteps of the steps to come. Where they cannot be told, every step will be full.

        Args:
            scheduler: With the call's timesteps set.
            family: Of the transformer.
            given: The timestep that the transformer is told first. It says where a call begins that runs the last of
                the scheduler's timesteps only, as image- and video-to-video do, whether or not they tell the scheduler.

        Raises:
            ScheduleError: the policy cannot serve so many steps.
        """
        timesteps, sigmas = scheduler.timesteps.tolist(), levels_of(scheduler)
        told = getattr(scheduler, "begin_index", None)
        begin = told or 0
        value, precision = _value(given)
        fits = [i for i, t in enumerate(timesteps) if _same(value, _argument(family, t), precision)]
        if begin not in fits:
            begin = fits[0] if len(fits) == 1 and told is None else None
        if begin is None:
            self.steps = len(timesteps)
            self._unplaced = f"it cannot be told which of the scheduler's timesteps the transformer's {value:g} is"
            return
        self._timesteps = [float(t) for t in timesteps[begin:]]
        self._sigmas = sigmas[begin:]
        self.process = process_of(scheduler)
        self.steps = len(self._timesteps)
        self.policy.start(self.steps)

    def is_stray(self, family: Family, given: torch.Tensor) -> bool:
        """Whether a transformer call that would begin the next step is none of the pipeline's steps.

        A callback, say, may call the transformer between two steps. Where the progress bar is moved on after every
        step, as most pipelines do, nothing but a callback comes before that; elsewhere the timestep has to be the one
        that is due, which on a CUDA device costs a wait. The next step's record will have a note of it.
        """
        if self.index == 0 or self._unplaced:
            return False
        if self.bar is not None and self.bar.updates >= self.index:
            self._updated_every_step = True
            return False
        if self._updated_every_step:
            self._stray = "a call of the transformer between two steps ran plain"
            return True
        value, precision = _value(given)
        due = _argument(family, self._timesteps[self.index])
        if _same(value, due, precision):
            return False
        self._stray = f"a call at timestep {value:g} ran plain, {due:g} was due"
        return True

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of the steps and the one after them; empty where they cannot be told."""
        return self._sigmas

    @property
    def timesteps(self) -> list[float]:
        """The scheduler's timesteps of the steps; empty where they cannot be told."""
        return self._timesteps

    @property
    def source(self) -> Hashable:
        return self._base, self._shape, self.calls

    @property
    def ran(self) -> Ran:
        """What the current step's prediction comes from."""
        assert self.record is not None
        if self.record.executed == "cached":
            return Ran.SKIPPED if self.record.multiple == SKIP else Ran.CACHED
        return Ran.FULL if self.record.multiple == 1 else Ran.COARSE

    @property
    def sigma(self) -> float:
        """Noise level of the current step; NaN where it cannot be told."""
        return self._sigmas[self.index] if self.index < len(self._timesteps) else math.nan

    @property
    def levels_around(self) -> tuple[float, float]:
        """Noise levels before and after the current step."""
        return self._sigmas[self.index], self._sigmas[self.index + 1]

    def level(self, device: torch.device) -> torch.Tensor:
        """σ of the current step where the latents are, a 0-dim tensor."""
        if self._levels is None or self._levels.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._levels = torch.tensor(self._sigmas or [math.nan], dtype=dtype, device=device)
        return self._levels[min(self.index, len(self._levels) - 1)]

    def process_on(self, device: torch.device) -> VariancePreserving | None:
        """The process of the call's latents, with its levels where they are."""
        if self.process is not None and self.process.levels.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.process = replace(self.process, levels=self.process.levels.to(device, dtype))
        return self.process

    def history(self, module: nn.Module, ordinal: int) -> PredictionHistory:
        """Memory of the ``ordinal``-th call per step of ``module``."""
        key = (id(module), ordinal)
        found = self._histories.get(key)
        if found is None:
            found = self._histories[key] = PredictionHistory()
        return found

    def lost(self, history: PredictionHistory) -> bool:
        """Whether a coarse call would have no full step to lean on, as after Wan 2.2 changes its transformer."""
        if not self._may_coarsen or history.anchors:
            return False
        # a schedule given by hand may do without the anchor where the path can
        return self._path.needs_anchor or (self._path.prefers_anchor and self._config.schedule is None)

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin_step(
        self, base: nn.Module, family: Family, inputs: ModelInputs | None, obstacle: str, executed: str
    ) -> None:
        """Chooses the multiple of the step that a transformer call begins, and opens its record.

        Args:
            base: The transformer.
            family: Of it.
            inputs: Of the call; None if it cannot run coarsely.
            obstacle: Why the step has to be full, if so.
            executed: How model runs are executed unless something falls back, "eager" or "graph".

        Raises:
            ScheduleError: the policy chose what cannot be run.
        """
        self.remembers = self._may_coarsen and not self._unplaced and not self.obstacle and self.index + 1 < self.steps
        note = self._unplaced or self.obstacle or obstacle
        if inputs is not None and self._shape != inputs.latent.shape:
            # a latent of another shape than before starts the evolution anew
            self._shape, self._patch = inputs.latent.shape, inputs.geometry.patch
            self._packed = family.packing(inputs.geometry)
            self.layout = inputs.geometry, self._packed, inputs.latent
            self._evolution.clear()
            self.cache_states.clear()
            self._histories.clear()
        self._evolution.begin_step()
        self._base = id(base)
        history = self.history(base, 0)
        if self.index > 0 and not note and self.lost(history):
            note = "no full step of this transformer to start from"
        multiple = self._choose(bool(note), len(history.recent))
        if multiple == SKIP and not history.recent:
            multiple, note = 1, note or "no full step of this transformer to start from"
        refused = family.obstacle(inputs, multiple) if inputs is not None and multiple > 1 else ""
        if refused:
            multiple, note = side_of(multiple), refused
        self._spacing.add(multiple)
        if multiple == 1 and self._is_clean():
            note = note or "a latent without noise has nothing for coarse steps to divide"
        if self.index == 0 and multiple > 1 and self._path.needs_anchor:
            coarse = self._config.coarse
            raise ScheduleError(f"schedule[0]={multiple}: coarse={coarse!r} needs a full first step (1).")
        if inputs is not None and getattr(base, "_parallel_config", None) is not None:
            multiple, divided = agree_on_multiple(base, inputs, multiple, self._path.needs_projections)
            note = divided or note
        known = self.index < len(self._timesteps)
        unread = unread_loras(family, base) if multiple > 1 and self._path.adapter is not None else ""
        self.record = StepRecord(
            index=self.index,
            timestep=self._timesteps[self.index] if known else math.nan,
            sigma=self._sigmas[self.index] if known else math.nan,
            multiple=multiple,
            tokens=inputs.geometry.tokens(multiple) if inputs is not None and multiple != SKIP else 0,
            executed=executed if multiple == 1 or (multiple > 1 and self._path.calls_model) else "cached",
            note=note or self._stray or unread,
        )
        self._stray = ""
        self._stop = stopwatch(inputs.latent.device if inputs is not None else torch.device("cpu"))

    def _choose(self, must_be_full: bool, runs: int) -> int:
        """The multiple of the step that begins, 0 to skip it; ``runs`` as in :class:`StepView`."""
        multiple, spacing = 1, self._spacing
        # elsewhere there is nothing to choose, and a policy that is asked may wait for the device
        if self.index < len(self._timesteps) and not must_be_full:
            counts = (spacing.consecutive_coarse, spacing.consecutive_skipped)
            sigma = self._sigmas[self.index]
            levels = tuple(self._sigmas[: self.steps])
            view = StepView(self.index, self.steps, sigma, *counts, runs, self._evolution.current, levels)
            multiple = self.policy.choose(view)
            if multiple != SKIP and multiple not in self._config.multiples:
                raise ScheduleError(
                    f"the policy chose {multiple!r} for step {self.index}: it must be one of {self._config.multiples}, "
                    f"or {SKIP} to skip the step."
                )
        return 1 if multiple > 1 and self._is_clean() else multiple

    def _is_clean(self) -> bool:
        """Whether a flow's latent has no noise left, as in the last step of some pipelines, which goes nowhere."""
        return self._may_coarsen and self.process is None and self.sigma == 0

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
        if result.ran_model:
            # guidance runs the model twice: one call in PyTorch is told
            record.kernels = "fused" if result.fused and record.kernels != "torch" else "torch"
        record.flops += result.flops
        record.full_flops += result.full_flops

    def end_step(self, increment: torch.Tensor | None) -> None:
        """Closes the current step's record, and starts the decision for the next one.

        Args:
            increment: Of the latent, float32; None if the evolution is not watched.
        """
        record = self.record
        assert record is not None and self._stop is not None
        self.stepped = (self.index, self.ran, self.source)
        self.index += 1
        self.calls = 0
        self.record = None
        self._replayed = True
        patch = self._patch if self.index < self.steps else None
        evolution = self._evolution.end_step(increment, patch, self._packed)
        if evolution is not None:
            record.patch_std, record.note = evolution.wait, partial(_note, record.note, evolution)
        record.miss = None if self.solver is None else self.solver.missed
        record.elapsed = self._stop()
        self.records.append(record)


class CallBar:
    """A pipeline's progress bar that counts its updates, and tells when its ``with`` block ends, however it ends.

    Args:
        bar: The pipeline's own.
        on_end: Called at the end.

    Attributes:
        updates: How often it was moved on.
    """

    def __init__(self, bar: Any, on_end: Callable[[], None]) -> None:
        self.updates = 0
        self._bar, self._on_end = bar, on_end

    def __enter__(self) -> CallBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        try:
            return self._bar.__exit__(*error)
        finally:
            self._on_end()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Moves the bar on."""
        self.updates += 1
        return self._bar.update(*args, **kwargs)

    def __iter__(self) -> Any:
        return iter(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts timing; call the result to stop, and what that returns for the seconds in between.

    On CUDA, events mark both ends in the stream, and only reading the seconds waits for the device.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the current stream may be another device's
        start.record(torch.cuda.current_stream(device))

        def stop() -> Callable[[], float]:
            end.record(torch.cuda.current_stream(device))

            def seconds() -> float:
                end.synchronize()
                return start.elapsed_time(end) / 1e3

            return seconds

        return stop

    began = time.perf_counter()

    def stop_host() -> Callable[[], float]:
        took = time.perf_counter() - began
        return lambda: took

    return stop_host


def _note(note: str, evolution: Evolution) -> str:
    finite = not any(map(math.isnan, evolution.wait().values()))
    return note if finite else "the latent is not finite (NaN or Inf)"


def _value(given: torch.Tensor) -> tuple[float, float]:
    """A timestep argument as a number, and the relative precision of its dtype."""
    precision = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
    return float(given), precision


def _argument(family: Family, timestep: float) -> float:
    """What the transformer is given for one of the scheduler's timesteps."""
    return float(family.time_of(timestep / 1000))


def _same(value: float, due: float, precision: float) -> bool:
    # pipelines round the timestep to the model's dtype before and after scaling it
    return abs(value - due) <= (2 * precision + 1e-6) * abs(due) + 1e-6
