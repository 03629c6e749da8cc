"""One accelerated pipeline: what is patched, and how a denoising step finds its size, its prediction and its record."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config import SKIP, DDiTConfig, ScheduleFn
from ..errors import ConfigError, DDiTError, ScheduleError, UnsupportedPipelineError
from ..families import Call, Family, NotCoarseError, denoisers
from ..granularity import Adapter, Geometry, check_fit, make_path
from ..runtime import (
    CaptureBackend,
    GraphRunner,
    HostResults,
    MethodPatch,
    PendingEvolution,
    agreed,
    make_runner,
    sequence_ranks,
    stopwatch,
    undividable,
    wrapped_forward,
)
from ..schedule import Report, StepRecord, check_length, step_with_increment
from .caches import StepCaches
from .call_state import CallState
from .checks import check_finite, check_scheduler, check_unshared
from .executor import StepExecutor, TransformerCall


class AcceleratedPipeline:
    """Patches one pipeline instance and serves its calls.

    Args:
        pipe: A diffusers pipeline.
        family: What is known of its transformer.
        config: Settings.
        adapter: Trained adapter, or None.
        capture: How to capture graphs; None follows ``config.cuda_graphs``.

    Raises:
        ConfigError: the coarse path needs an adapter and there is none, or graphs a CUDA device.
        AdapterMismatchError: the adapter belongs to another model or lacks a multiple.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        config: DDiTConfig,
        adapter: Adapter | None = None,
        capture: CaptureBackend | None = None,
    ) -> None:
        self.pipe = pipe
        self.family = family
        self.config = config = config.resolved(adapter is not None, None if adapter is None else adapter.spec.reach)
        name = config.coarse
        learned = name in ("adapter", "adapter-delta")
        if learned and adapter is None:
            raise ConfigError(f"coarse={name!r} needs adapter=...: pass an adapter, or coarse='delta'.")
        self.coarse = name
        adapter = adapter if learned else None
        if config.merge_adapter and adapter is None:
            raise ConfigError("merge_adapter=True: there is no adapter to merge; pass adapter=..., or leave it out.")
        self._path = make_path(name, config.residual, adapter, config.high_band)
        trained = adapter.spec.positions if adapter is not None else "native"
        positions = ("interpolated" if name == "naive" else trained) if config.positions == "auto" else config.positions
        graphs = make_runner(config.cuda_graphs, config.max_graphs) if capture is None else None
        if capture is not None:
            graphs = GraphRunner(capture, config.max_graphs)
        sizes = [k for k in config.multiples if k > 1] if config.merge_adapter else []
        self._rows = StepExecutor(family, self._path, positions == "native", adapter, graphs, sizes)
        by_signal = (len(config.multiples) > 1 and config.threshold > 0) or config.skip_below > 0
        self._may_coarsen = config.schedule is not None or by_signal
        self._local = threading.local()
        self._report: Report | None = None
        self._scheduler: Any = None
        self._scheduler_patches: list[MethodPatch] = []
        self._modules = denoisers(pipe, family)
        if adapter is not None:
            for component, module in self._modules.items():
                base = unwrap_module(module)
                check_fit(
                    adapter, family.name, family.ends(base), family.linear_layers(base), component, config.multiples
                )
        self._caches = StepCaches(config.cache, family, self._modules)
        self._forward_patches = [
            MethodPatch(module, "forward", self._forward_handler(module)) for module in self._modules.values()
        ]
        self._offload_patch = MethodPatch(pipe, "maybe_free_model_hooks", self._on_free_model_hooks)

    # -- putting on and taking off ------------------------------------------------------------------------------

    def attach(self) -> None:
        """Patches the transformers and the scheduler; on an error nothing stays patched.

        Raises:
            UnsupportedPipelineError: a component belongs to another accelerated pipeline, is compiled as a whole in
                place, or the scheduler does not predict a flow.
            ConfigError: a cache is to be enabled where there is one.
        """
        check_scheduler(self.pipe.scheduler)
        for name, module in self._modules.items():
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise UnsupportedPipelineError(
                    f"{name}.compile() hides its forward. Use {name}.compile_repeated_blocks() or "
                    f"pipe.{name} = torch.compile(pipe.{name}), before accelerate()."
                )
        self._caches.check()
        for owner in (*self._modules.values(), self.pipe.scheduler):
            check_unshared(owner)
        try:
            self._caches.enable()
            for module in self._modules.values():
                module.__dict__["_ddit_pipeline"] = self
            for patch in self._forward_patches:
                patch.ensure_outermost()
            self._offload_patch.ensure_outermost()
            self._attach_scheduler()
        except BaseException:
            self.detach()
            raise

    def __deepcopy__(self, memo: Any) -> None:
        """A copied scheduler or transformer would drive the original through its patches.

        Raises:
            DDiTError: always.
        """
        raise DDiTError(
            f"a component of an accelerated {type(self.pipe).__name__} cannot be copied: ddit_rt.restore(pipe) first."
        )

    def detach(self) -> None:
        """Takes every patch away; modules, outputs and settings are as before :meth:`attach`."""
        for patch in (*self._forward_patches, *self._scheduler_patches, self._offload_patch):
            patch.remove()
        for owner in (*self._modules.values(), self._scheduler):
            if owner is not None:
                owner.__dict__.pop("_ddit_pipeline", None)
        self._caches.disable()
        self._scheduler, self._scheduler_patches = None, []
        if self._rows.graphs is not None:
            self._rows.graphs.clear()

    def _attach_scheduler(self) -> None:
        """Follows the pipeline's scheduler, which users exchange at will."""
        scheduler = self.pipe.scheduler
        check_scheduler(scheduler)
        check_unshared(scheduler)
        for patch in self._scheduler_patches:
            patch.remove()
        if self._scheduler is not None:
            self._scheduler.__dict__.pop("_ddit_pipeline", None)
        self._scheduler = scheduler
        scheduler.__dict__["_ddit_pipeline"] = self
        self._scheduler_patches = [
            MethodPatch(scheduler, "set_timesteps", self._on_set_timesteps),
            MethodPatch(scheduler, "step", self._on_step),
        ]
        for patch in self._scheduler_patches:
            patch.ensure_outermost()

    @property
    def transformers(self) -> int:
        """How many transformers take turns in a call."""
        return len(self._modules)

    @contextmanager
    def following(self, schedule: ScheduleFn) -> Iterator[list[Report]]:
        """Within the context calls follow ``schedule``, whatever the settings; afterwards settings and report are back.

        Yields:
            A list that holds the report of the last call when the context ends.
        """
        kept = (self.config, self._may_coarsen, self._report)
        reports: list[Report] = []
        self.config, self._may_coarsen = replace(self.config, schedule=schedule), True
        try:
            yield reports
            reports += [self._report] if self._report is not None else []
        finally:
            self.config, self._may_coarsen, self._report = kept

    # -- one pipeline call --------------------------------------------------------------------------------------

    @property
    def report(self) -> Report | None:
        """Report of the last call (or of the one under way)."""
        return self._report

    def _on_set_timesteps(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Every pipeline call sets its timesteps once, before the loop: this is where a call begins."""
        self._local.run = None
        for name, module in denoisers(self.pipe, self.family).items():
            if module is not self._modules.get(name):
                raise UnsupportedPipelineError(f"{name} was exchanged after accelerate(): call accelerate(pipe) again.")
        result = inner(*args, **kwargs)
        for patch in self._forward_patches:
            patch.ensure_outermost()
        self._begin_run()
        return result

    def _on_free_model_hooks(self, inner: Any) -> None:
        """Every pipeline call ends here, interrupted ones too. CPU offload takes all patches off the transformers then:
        without them, the next call would not notice a scheduler exchanged in between."""
        self._local.run = None
        inner()
        for patch in self._forward_patches:
            patch.ensure_outermost()

    def _begin_run(self) -> None:
        self._caches.reset()
        self._local.run = CallState(self.config)
        self._report = Report(self._local.run.records, self.config.to_dict())

    def _forward_handler(self, module: nn.Module) -> Any:
        def handle(inner: Any, *args: Any, **kwargs: Any) -> Any:
            if self.pipe.scheduler is not self._scheduler:
                self._attach_scheduler()
                self._begin_run()
            run: CallState | None = getattr(self._local, "run", None)
            if run is None:
                return inner(*args, **kwargs)
            return self._forward(run, module, inner, args, kwargs)

        return handle

    def _forward(self, run: CallState, module: nn.Module, inner: Any, args: Any, kwargs: Any) -> Any:
        base = unwrap_module(module)
        arguments = self.family.bind(args, kwargs)
        call, reason = None, ""
        try:
            call = self.family.parse(base, arguments)
        except NotCoarseError as error:
            reason = str(error)
        self._rows.refresh(base, call, run)
        if run.record is None:
            self._begin_step(run, base, call, reason)
        record, ordinal = run.record, run.calls
        assert record is not None
        run.calls += 1
        at, obstacle = self._caches.forwards(run, base, inner, ordinal), wrapped_forward(inner, base)
        if getattr(base, "is_cache_enabled", False):
            obstacle = "a cache of diffusers decides inside the transformer"
        visit = TransformerCall(run, base, arguments, call, at, obstacle, self._caches.teacache(run, base, ordinal))
        # guidance that begins in mid-run has a second call without a full step, where the first call has one
        trajectory = run.trajectory(base, ordinal)
        lost = ordinal > 0 and self._lost(run, base, ordinal)
        lost |= record.multiple == SKIP and not trajectory.recent
        if call is None or record.multiple == 1 or lost:
            raw = self._rows.full(visit)
            # the last step has no successor to remember for
            if call is not None and not run.skipped and self._may_coarsen and run.index + 1 < run.steps:
                trajectory.add_full(self._rows.anchor(visit, raw))
            return raw
        if self._makes_no_call(record.multiple):
            prediction = trajectory.forecast(record.sigma, linear=record.multiple == SKIP or self.coarse != "reuse")
        else:
            prediction = self._rows.coarse(visit, trajectory, record.multiple)
            if not run.skipped:
                trajectory.add_run(record.sigma, prediction)
        record.full_flops += self._rows.full_flops(base, call)
        return self.family.wrap(base, call, prediction.to(call.latent.dtype))

    def _begin_step(self, run: CallState, base: nn.Module, call: Call | None, reason: str) -> None:
        scheduler = self._scheduler
        if run.index == 0:
            run.read_timesteps(scheduler)
            check_length(self.config.schedule, run.steps)
            check_finite(call)
            if isinstance(self.config.schedule, tuple) and self.config.schedule[0] == SKIP:
                raise ScheduleError("schedule[0]=0: the first step has no prediction to go on from; begin with 1.")
        if call is not None and run.shape != call.latent.shape:
            run.forget(call.latent.shape)
        run.evolution, run.pending = run.pending, None
        if run.index > 0 and self._lost(run, base, 0) and not reason:
            reason = "no full step of this transformer to start from"
        multiple = self._choose(run, must_be_full=bool(reason), may_skip=bool(run.trajectory(base, 0).recent))
        if run.index == 0 and multiple > 1 and self._path.needs_anchor:
            raise ScheduleError(f"schedule[0]={multiple}: coarse={self.coarse!r} needs a full first step (1).")
        if call is not None:
            multiple, obstacle = self._among_ranks(base, call, multiple)
            reason = obstacle or reason
        tokens = call.geometry.tokens(multiple) if call is not None and multiple != SKIP else 0
        run.record = StepRecord(
            index=run.index,
            timestep=run.timestep,
            sigma=run.sigma,
            multiple=multiple,
            tokens=tokens,
            executed=self._executed(multiple),
            note=reason,
        )
        run.stop = stopwatch(call.latent.device if call is not None else torch.device("cpu"))
        if call is not None:
            run.geometry = call.geometry

    def _choose(self, run: CallState, must_be_full: bool, may_skip: bool) -> int:
        """The multiple of the current step; waits for no more of the evolution than the choice needs."""
        patch_std, decided, schedule = {}, None, self.config.schedule
        if run.evolution is not None and schedule is None:
            decided = run.evolution.decision()
        if run.evolution is not None and (callable(schedule) or self.config.skip_below > 0):
            patch_std = run.evolution.wait()
        return run.policy.choose(run.index, patch_std, must_be_full, may_skip, decided)

    def _among_ranks(self, base: nn.Module, call: Call, multiple: int) -> tuple[int, str]:
        """The multiple for all ranks that share the sequence, and why it is not what they would choose, if so."""
        group = sequence_ranks(base)
        if group is None:
            return multiple, ""
        multiple = agreed(multiple, group, call.latent.device)
        if multiple in (SKIP, 1):
            return multiple, ""
        obstacle = undividable(call.geometry.tokens(multiple), group)
        if self._path.needs_embedding:
            obstacle = f"coarse={self.coarse!r} has ends of its own, which context parallelism does not split"
        return (1, obstacle) if obstacle else (multiple, "")

    def _executed(self, multiple: int) -> str:
        """How a step will run unless something falls back."""
        if self._makes_no_call(multiple):
            return "cached"
        return "eager" if self._rows.graphs is None else "graph"

    def _makes_no_call(self, multiple: int) -> bool:
        return multiple == SKIP or (multiple > 1 and self.coarse in ("extrapolate", "reuse"))

    def _lost(self, run: CallState, base: nn.Module, ordinal: int) -> bool:
        """Whether a coarse call would have no full step to lean on, as after Wan 2.2 changes its transformer."""
        if not self._may_coarsen or run.trajectory(base, ordinal).last is not None:
            return False
        # a schedule given by hand may do without the anchor where the path can
        return self._path.needs_anchor or (self.coarse == "delta" and self.config.schedule is None)

    def _on_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        run: CallState | None = getattr(self._local, "run", None)
        if run is None or run.record is None:
            return inner(*args, **kwargs)
        names = ("model_output", "timestep", "sample")
        given = {**dict(zip(names, args)), **kwargs}
        rest = args[len(names) :]
        if len(self.config.multiples) > 1 or self.config.skip_below > 0:
            step_args = [given.pop(name) for name in names]
            result, increment = step_with_increment(inner, self._scheduler, *step_args, *rest, **given)
            run.history.push(increment)
        else:
            result = inner(*args, **kwargs)
        run.end_step()
        if run.index >= run.steps:
            self._local.run = None
            if self._report is not None and self._report.steps is run.records:
                self._report.complete = True
        elif run.history.full and run.geometry is not None:
            self._launch(run, run.geometry)
        return result

    def _launch(self, run: CallState, geometry: Geometry) -> None:
        """Starts the decision for the next step."""
        increments, config = run.history.increments, self.config
        if increments[0].is_cuda and run.host is None:
            run.host = HostResults(increments[0].shape[0], len(config.multiples))
        run.pending = PendingEvolution(
            increments,
            config.multiples,
            geometry.patch,
            config.quantile,
            geometry.grid(1) if increments[0].ndim == 3 else None,
            config.backend,
            config.threshold,
            run.host,
        )
