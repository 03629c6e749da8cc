"""One accelerated pipeline: what is patched, and how a transformer call finds size, prediction and record."""

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
from ..errors import ScheduleError, UnsupportedPipelineError
from ..families import Family, ModelInputs, NotCoarseError, denoisers
from ..granularity import Adapter, CoarsePath, PathOptions, check_fit, default_path, make_path
from ..runtime import (
    CaptureBackend,
    GraphRunner,
    MethodPatch,
    agreed,
    make_runner,
    sequence_ranks,
    undividable,
    wrapped_forward,
)
from ..schedule import Report, make_policy, step_with_increment
from .caches import StepCaches
from .call_state import CallState
from .caller import NOBODY, CallBar, calling_pipeline
from .checks import check_finite, check_merge, check_not_compiled, check_scheduler, check_unshared
from .executor import StepExecutor
from .plain_state import keep_plain, release_plain
from .transformer_call import TransformerCall


class AcceleratedPipeline:
    """Patches one pipeline instance and serves its calls, and those of pipelines that share all its components.

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
        name = default_path(adapter is not None) if config.coarse == "auto" else config.coarse
        self._path: CoarsePath = make_path(name, PathOptions(config.residual, config.high_band, adapter))
        check_merge(config, self._path)
        limit = self._path.max_consecutive if config.max_consecutive_coarse == "auto" else config.max_consecutive_coarse
        self.config = replace(config, coarse=name, max_consecutive_coarse=limit)
        self._policy = make_policy(self.config, limit)
        positions = self._path.positions if config.positions == "auto" else config.positions
        if capture is None:
            graphs = make_runner(config.cuda_graphs, config.max_graphs)
        else:
            graphs = GraphRunner(capture, config.max_graphs)
        sizes = [k for k in config.multiples if k > 1] if config.merge_adapter else []
        self._executor = StepExecutor(family, self._path, positions == "native", graphs, sizes)
        # the evolution is watched for the report, too
        self._watches = len(config.multiples) > 1 or config.skip_below > 0
        by_threshold = (len(config.multiples) > 1 and config.threshold > 0) or config.skip_below > 0
        self._may_coarsen = config.schedule is not None or by_threshold
        self._local = threading.local()
        self._report: Report | None = None
        self._scheduler: Any = None
        self._scheduler_patches: list[MethodPatch] = []
        self._modules = denoisers(pipe, family)
        if self._path.adapter is not None:
            for component, module in self._modules.items():
                check_fit(self._path.adapter, family.facts(unwrap_module(module)), component, config.multiples)
        self._caches = StepCaches(config.cache, family, self._modules)
        self._forward_patches = [
            MethodPatch(module, "forward", self._forward_handler(module)) for module in self._modules.values()
        ]
        self._pipe_patches = [
            MethodPatch(pipe, "maybe_free_model_hooks", self._on_free_model_hooks),
            MethodPatch(pipe, "progress_bar", self._on_progress_bar),
        ]

    # -- putting on and taking off --------------------------------------------------------------------------------

    def attach(self) -> None:
        """Patches the transformers, the scheduler and the pipeline; on an error nothing stays patched.

        Raises:
            UnsupportedPipelineError: a component belongs to another accelerated pipeline, is compiled as a whole in
                place, or the scheduler does not predict a flow.
            ConfigError: a cache is to be enabled where there is one, or one is on that coarse steps cannot go with.
        """
        check_scheduler(self.pipe.scheduler)
        check_not_compiled(self._modules)
        self._caches.check(self.config.multiples)
        for owner in (*self._modules.values(), self.pipe.scheduler):
            check_unshared(owner)
        try:
            self._caches.enable()
            for module, patch in zip(self._modules.values(), self._forward_patches):
                keep_plain(module, self, [patch])
                patch.ensure_outermost()
            keep_plain(self.pipe, self, self._pipe_patches)
            for patch in self._pipe_patches:
                patch.ensure_outermost()
            self._attach_scheduler()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Takes every patch away; modules, outputs and settings are as before :meth:`attach`."""
        for patch in (*self._forward_patches, *self._scheduler_patches, *self._pipe_patches):
            patch.remove()
        for owner in (*self._modules.values(), self._scheduler, self.pipe):
            if owner is not None:
                release_plain(owner)
        self._caches.disable()
        self._scheduler, self._scheduler_patches = None, []
        self._local = threading.local()
        if self._executor.graphs is not None:
            self._executor.graphs.clear()

    def _attach_scheduler(self) -> None:
        """Follows the pipeline's scheduler, which users exchange at will."""
        scheduler = self.pipe.scheduler
        check_scheduler(scheduler)
        check_unshared(scheduler)
        for patch in self._scheduler_patches:
            patch.remove()
        if self._scheduler is not None:
            release_plain(self._scheduler)
        self._scheduler = scheduler
        self._scheduler_patches = [
            MethodPatch(scheduler, "set_timesteps", self._on_set_timesteps),
            MethodPatch(scheduler, "step", self._on_step),
        ]
        keep_plain(scheduler, self, self._scheduler_patches)
        for patch in self._scheduler_patches:
            patch.ensure_outermost()

    @property
    def transformers(self) -> dict[str, nn.Module]:
        """Component name -> transformer; they take turns in a call."""
        return dict(self._modules)

    @contextmanager
    def following(self, schedule: ScheduleFn) -> Iterator[list[Report]]:
        """Within the context calls follow ``schedule``, whatever the settings; afterwards settings and report are back.

        Yields:
            A list that holds the report of the last call when the context ends.
        """
        kept = (self.config, self._policy, self._may_coarsen, self._report)
        reports: list[Report] = []
        self.config, self._may_coarsen = replace(self.config, schedule=schedule), True
        self._policy = make_policy(self.config, None)
        try:
            yield reports
            reports += [self._report] if self._report is not None else []
        finally:
            self.config, self._policy, self._may_coarsen, self._report = kept

    # -- one pipeline call ----------------------------------------------------------------------------------------

    @property
    def report(self) -> Report | None:
        """Report of the last call (or of the one under way)."""
        return self._report

    def _serves(self, owner: Any) -> bool:
        """Whether a pipeline's calls are ours: our own pipeline, or one made of the same components."""
        if owner is None or owner is self.pipe:
            return True
        return (
            isinstance(owner, self.family.pipelines)
            and owner.scheduler is self._scheduler
            and denoisers(owner, self.family) == self._modules
        )

    def _begin_call(self, caller: tuple[Any, int]) -> None:
        self._caches.reset()
        self._executor.begin_call()
        self._local.call = CallState(self.config, self._policy, caller)
        self._report = Report(self._local.call.records, self.config.to_dict())

    def _end_call(self) -> None:
        self._local.call = None

    def _current_call(self, caller: tuple[Any, int]) -> CallState | None:
        """The call that a transformer or the scheduler works for, if it is one of ours."""
        call: CallState | None = getattr(self._local, "call", None)
        if call is None or call.caller == caller:
            return call
        if caller == NOBODY:  # the pipeline's call is over, and did not come to its end
            self._end_call()
        return None

    def _on_set_timesteps(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Every pipeline call sets its timesteps once, before the loop: this is where a call begins."""
        caller = calling_pipeline()
        if not self._serves(caller[0]):
            return inner(*args, **kwargs)
        self._end_call()
        for name, module in denoisers(self.pipe, self.family).items():
            if module is not self._modules.get(name):
                raise UnsupportedPipelineError(f"{name} was exchanged after accelerate(): call accelerate(pipe) again.")
        result = inner(*args, **kwargs)
        for patch in self._forward_patches:
            patch.ensure_outermost()
        self._begin_call(caller)
        return result

    def _on_progress_bar(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The loop of a pipeline call lies inside its progress bar, which closes however the loop ends."""
        bar, caller = inner(*args, **kwargs), calling_pipeline()
        if caller[0] is not self.pipe:
            return bar
        for patch in self._forward_patches:
            patch.ensure_outermost()
        if self.pipe.scheduler is not self._scheduler:
            self._attach_scheduler()
            self._begin_call(caller)
        call = self._current_call(caller)
        if call is None:
            return bar
        call.updates = 0

        def update() -> None:
            assert call.updates is not None
            call.updates += 1

        return CallBar(bar, update, self._end_call)

    def _on_free_model_hooks(self, inner: Any) -> None:
        """Every pipeline call ends here, interrupted ones too. CPU offload takes all patches off the transformers then:
        without them, the next call would not notice a scheduler exchanged in between."""
        self._end_call()
        inner()
        for patch in self._forward_patches:
            patch.ensure_outermost()

    def _forward_handler(self, module: nn.Module) -> Any:
        def handle(inner: Any, *args: Any, **kwargs: Any) -> Any:
            caller = calling_pipeline()
            if self.pipe.scheduler is not self._scheduler and (caller == NOBODY or caller[0] is self.pipe):
                self._attach_scheduler()
                self._begin_call(caller)
            call = self._current_call(caller)
            if call is None:
                return inner(*args, **kwargs)
            return self._run(call, unwrap_module(module), inner, args, kwargs)

        return handle

    def _run(self, call: CallState, base: nn.Module, inner: Any, args: Any, kwargs: Any) -> Any:
        """Runs one transformer call of a step and remembers it."""
        family = self.family
        arguments = {**dict(zip(family.argument_names, args)), **kwargs}
        inputs, reason = None, self._caches.obstacle(base)
        try:
            inputs = family.parse(base, arguments)
        except NotCoarseError as error:
            reason = str(error)
        self._executor.refresh(base, inputs)
        unfit = ""
        if call.record is None:
            if call.index == 0:
                unfit = call.start(self._scheduler, family, arguments[family.time_argument])
                check_finite(inputs)
            unfit = unfit or call.unfit(family, arguments[family.time_argument])
            self._begin_step(call, base, inputs, unfit or reason)
        record, ordinal = call.record, call.calls
        assert record is not None
        call.calls += 1
        transformer_call = self._describe(call, base, inner, arguments, inputs, ordinal)
        history = call.history(base, ordinal)
        multiple = record.multiple
        # guidance that begins in mid-run has a second call without a full step, where the first call has one
        lost = ordinal > 0 and self._lost(call, base, ordinal)
        lost |= multiple == SKIP and not history.recent
        if inputs is None or multiple == 1 or lost:
            result = self._executor.full(transformer_call)
            # the last step has no successor to remember for
            remembers = self._may_coarsen and call.index + 1 < call.steps
            if inputs is not None and remembers and not result.blocks_skipped and not unfit:
                history.add_full(self._executor.anchor(transformer_call, result.output))
        elif self._makes_no_call(multiple):
            result = self._executor.skipped(transformer_call, history, multiple)
        else:
            result = self._executor.coarse(transformer_call, history, multiple)
            if not result.blocks_skipped:
                assert result.prediction is not None
                history.add_run(record.sigma, result.prediction)
        call.add(result)
        return result.output

    def _describe(
        self,
        call: CallState,
        base: nn.Module,
        inner: Any,
        arguments: dict[str, Any],
        inputs: ModelInputs | None,
        ordinal: int,
    ) -> TransformerCall:
        forward, obstacle = self._caches.forwards(call, base, inner, ordinal), ""
        if self._executor.graphs is not None:
            obstacle = self._caches.capture_obstacle(base) or wrapped_forward(inner, base)
        device = inputs.latent.device if inputs is not None else torch.device("cpu")
        return TransformerCall(
            base,
            arguments,
            inputs,
            call.index,
            call.steps,
            call.sigma,
            call.level(device),
            forward,
            obstacle,
            self._caches.teacache(call.cache_states, base, ordinal),
        )

    def _begin_step(self, call: CallState, base: nn.Module, inputs: ModelInputs | None, reason: str) -> None:
        call.see_shape(inputs)
        if call.index > 0 and self._lost(call, base, 0) and not reason:
            reason = "no full step of this transformer to start from"
        multiple = call.choose(must_be_full=bool(reason), can_skip=bool(call.history(base, 0).recent))
        if call.index == 0 and multiple > 1 and self._path.needs_anchor:
            raise ScheduleError(f"schedule[0]={multiple}: coarse={self.config.coarse!r} needs a full first step (1).")
        if inputs is not None and getattr(base, "_parallel_config", None) is not None:
            multiple, obstacle = self._among_ranks(base, inputs, multiple)
            reason = obstacle or reason
        executed = "eager" if self._executor.graphs is None else "graph"
        call.begin_step(multiple, inputs, "cached" if self._makes_no_call(multiple) else executed, reason)

    def _among_ranks(self, base: nn.Module, inputs: ModelInputs, multiple: int) -> tuple[int, str]:
        """The multiple for all ranks that share the sequence, and why it is not what they would choose, if so."""
        group = sequence_ranks(base)
        if group is None:
            return multiple, ""
        multiple = agreed(multiple, group, inputs.latent.device)
        if multiple in (SKIP, 1):
            return multiple, ""
        obstacle = undividable(inputs.geometry.tokens(multiple), group)
        if self._path.needs_projections:
            coarse = self.config.coarse
            obstacle = f"coarse={coarse!r} has projections of its own, which context parallelism does not split"
        return (1, obstacle) if obstacle else (multiple, "")

    def _makes_no_call(self, multiple: int) -> bool:
        return multiple == SKIP or (multiple > 1 and not self._path.calls_model)

    def _lost(self, call: CallState, base: nn.Module, ordinal: int) -> bool:
        """Whether a coarse call would have no full step to lean on, as after Wan 2.2 changes its transformer."""
        if not self._may_coarsen or call.history(base, ordinal).anchors:
            return False
        # a schedule given by hand may do without the anchor where the path can
        return self._path.needs_anchor or (self._path.prefers_anchor and self.config.schedule is None)

    def _on_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._current_call(calling_pipeline())
        if call is None or call.record is None:
            return inner(*args, **kwargs)
        names = ("model_output", "timestep", "sample")
        given = {**dict(zip(names, args)), **kwargs}
        rest = args[len(names) :]
        increment = None
        if self._watches:
            step_args = [given.pop(name) for name in names]
            result, increment = step_with_increment(inner, self._scheduler, *step_args, *rest, **given)
        else:
            result = inner(*args, **kwargs)
        call.end_step(increment, self.family)
        if call.index >= call.steps:
            self._end_call()
            if self._report is not None and self._report.steps is call.records:
                self._report.complete = True
        return result
