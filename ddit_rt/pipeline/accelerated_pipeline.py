"""One accelerated pipeline: what is patched, and how a transformer call finds size, prediction and record."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config import DDiTConfig
from ..errors import UnsupportedPipelineError
from ..families import Family, NotCoarseError, denoisers
from ..granularity import Adapter, CoarsePath, PathOptions, check_fit, default_path, make_path
from ..multiples import SKIP
from ..runtime import (
    CaptureBackend,
    GraphRunner,
    MethodPatch,
    divided,
    is_parallel,
    make_runner,
    of_first_rank,
    wrapped_forward,
)
from ..schedule import (
    FittedSchedule,
    FlowSolver,
    Policy,
    Report,
    check_aim,
    follows_the_flow,
    make_policy,
    noise_of_call,
    origin_of,
    solves_the_flow,
    step_with_increment,
    without_waiting,
)
from ..schedule_config import ScheduleFn
from .attachment import Attachment
from .caches import StepCaches
from .call_state import CallBar, CallState
from .caller import NOBODY, arguments_of_call, calling_pipeline, local_of_call
from .checks import (
    check_even,
    check_finite,
    check_parallel,
    check_settings,
    chosen_attention,
)
from .executor import StepExecutor
from .guidance import BatchedGuidance
from .learning import Listener
from .levels import place_levels
from .modulation import ModulationAhead
from .progress import Progress, Watcher, clean_latent
from .stepping import SchedulerStep, solved_step
from .targets import OWN_LEVELS, KeptSchedules, has_own_levels
from .transformer_call import PromptText, StepResult, TransformerCall

_FIRST_METHODS = ("check_inputs", "encode_prompt")
"""Where a pipeline's call first shows its arguments as they were given, and its scheduler before it is used."""


class AcceleratedPipeline:
    """Patches one pipeline instance and serves its calls, and those of pipelines that share all its components.

    Args:
        pipe: A diffusers pipeline.
        family: What is known of its transformer.
        config: Settings.
        adapter: Trained adapter, or None.
        capture: How to capture graphs; None follows ``config.cuda_graphs``.
        folders: Where to look for kept schedules beside the user's own and the shipped ones.

    Attributes:
        kept: Finds kept schedules.
        listener: Tells of calls for which none was kept; None unless ``config.fit`` asks for it.

    Raises:
        ConfigError: the coarse path needs an adapter and there is none, graphs a CUDA device, or the family cannot work
            with one of the multiples.
        ScheduleError: the same of the schedule's.
        AdapterMismatchError: the adapter belongs to another model or lacks a multiple.
        UnsupportedPipelineError: the coarse path reads the transformer's ends, and they keep their values out of reach.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        config: DDiTConfig,
        adapter: Adapter | None = None,
        capture: CaptureBackend | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        self.pipe = pipe
        self.family = family
        config = config.limited_to(family.multiples, f"{type(pipe).__name__} (family {family.name})")
        name = default_path(adapter is not None) if config.coarse == "auto" else config.coarse
        self._path: CoarsePath = make_path(name, PathOptions(config.residual, config.high_band, adapter))
        self._modules = denoisers(pipe, family)
        check_settings(config, family, self._path, self._modules)
        limit = self._limit_of(config)
        self.config = config.model_copy(update={"coarse": name, "max_consecutive_coarse": limit})
        self._policy = self.policy_of(self.config)
        self.kept = KeptSchedules(pipe, family, adapter, folders)
        self.listener = None if config.fit is None else Listener()
        positions = self._path.positions if config.positions == "auto" else config.positions
        if capture is None:
            graphs = make_runner(config.cuda_graphs, config.max_graphs)
        else:
            graphs = GraphRunner(capture, config.max_graphs)
        sizes = [k for k in config.multiples if k > 1] if config.merge_adapter else []
        kernels = (config.backend, config.fused_full)
        self._executor = StepExecutor(family, self._path, positions == "native", graphs, sizes, *kernels)
        # the evolution is watched for the report, too
        self._watches = len(config.multiples) > 1 or config.skip_below > 0
        self._first_method = next((name for name in _FIRST_METHODS if hasattr(pipe, name)), "")
        self._local = threading.local()
        self._report: Report | None = None
        self._reported = 0
        if self._path.adapter is not None:
            for component, module in self._modules.items():
                check_fit(self._path.adapter, family.facts(unwrap_module(module)), component, config.multiples)
        self._attention = chosen_attention(config.attention, pipe, family, self._modules)
        self._caches = StepCaches(config.cache, family, self._modules)
        self._attachment = Attachment(
            self,
            pipe,
            family,
            self._modules,
            self._caches,
            self._attention,
            forward=self._forward_handler,
            scheduler={"set_timesteps": self._on_set_timesteps, "step": self._on_step},
            pipeline={
                self._first_method: self._on_first_method,
                "maybe_free_model_hooks": self._on_free_model_hooks,
                "progress_bar": self._on_progress_bar,
            },
        )

    # -- putting on and taking off --------------------------------------------------------------------------------

    def attach(self) -> None:
        """Patches the transformers, the scheduler and the pipeline; raises as :meth:`Attachment.put_on` does."""
        self._attachment.put_on(self.config)

    def detach(self) -> None:
        """Takes every patch away; modules, outputs and settings are as before :meth:`attach`."""
        self._attachment.take_off()
        self._local = threading.local()
        if self._executor.graphs is not None:
            self._executor.graphs.clear()

    @property
    def transformers(self) -> dict[str, nn.Module]:
        """Component name -> transformer; they take turns in a call."""
        return dict(self._modules)

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """Within the context the pipeline is plain, or whatever is made of it there; afterwards it is as before."""
        self.detach()
        try:
            yield
        finally:
            self.attach()

    @contextmanager
    def following(self, schedule: ScheduleFn) -> Iterator[list[Report]]:
        """Within the context calls follow ``schedule``, whatever the settings; afterwards settings and report are back.

        Yields:
            A list that holds the report of the last call when the context ends.
        """
        kept = self._report
        reports: list[Report] = []
        try:
            config = self.config.replace(schedule=schedule, speedup=None, quality=None, fit=None)
            with self.following_settings(config, None):
                yield reports
            reports += [self._report] if self._report is not None else []
        finally:
            self._report = kept

    @contextmanager
    def following_settings(self, config: DDiTConfig, limit: int | Literal["own"] | None = "own") -> Iterator[None]:
        """Within the context calls choose their steps by ``config``, which differs in nothing that executes a step.

        Args:
            config: Settings.
            limit: Longest run of coarse steps, None for no limit; "own" is that of the settings.

        Raises:
            ConfigError: the scheduler has no converged picture, and the settings aim at that.
        """
        kept = (self.config, self._policy)
        policy = self.policy_of(config, limit)
        self.config, self._policy = config, policy
        try:
            yield
        finally:
            self.config, self._policy = kept

    def policy_of(self, config: DDiTConfig, limit: int | Literal["own"] | None = "own") -> Policy:
        """What a call with these settings follows on this pipeline; arguments and errors as :meth:`following_settings`.

        Its ``start`` tells beforehand whether a call of so many steps can be made.
        """
        check_aim(config, self.pipe.scheduler)
        longest = self._limit_of(config) if limit == "own" else limit
        return make_policy(config, longest, self.family.boundaries(self.pipe))

    def _limit_of(self, config: DDiTConfig) -> int | None:
        wanted = config.max_consecutive_coarse
        return self._path.max_consecutive if isinstance(wanted, str) else wanted

    # -- one pipeline call ----------------------------------------------------------------------------------------

    @property
    def watcher(self) -> Watcher | None:
        """Who hears of the steps that end in calls of this thread."""
        return getattr(self._local, "watcher", None)

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        self._local.watcher = watcher

    @property
    def report(self) -> Report | None:
        """Report of the last call (or of the one under way)."""
        return self._report

    def _serves(self, owner: Any) -> bool:
        """Whether a pipeline's calls are ours: our own pipeline, or one made of the same components."""
        if owner is None or owner is self.pipe:
            return True
        known = self.family.knows(owner) and getattr(owner, "scheduler", None) is self._attachment.scheduler
        return known and denoisers(owner, self.family) == self._modules

    def _begin_call(
        self,
        caller: tuple[Any, int],
        arguments: Mapping[str, Any],
        kept: FittedSchedule | None = None,
        origin: str = "",
    ) -> None:
        self._caches.reset()
        self._executor.begin_call()
        call = CallState(self.config, kept or self._policy, self._path, caller)
        if self.config.batch_guidance != "never":
            call.guidance = BatchedGuidance(self.family, self._executor, self.config.batch_guidance == "always")
        noise = noise_of_call(self._attachment.scheduler, arguments)
        if self.config.trim_text and arguments and not any(map(is_parallel, self._modules.values())):
            tokens = self.family.text_in_prompt(caller[0], arguments)
            call.text = None if tokens is None else PromptText(tokens)
        if noise:
            call.obstacle = f"{noise} adds noise in every step, which no earlier step foretells"
        self._local.call, self._local.report = call, self._new_report(call, kept, origin)
        # a pipeline that works in segments sets its timesteps once more behind the last
        if self._report is None or not self._report.complete or self._reported != caller[1]:
            self._show_report(caller)

    def _new_report(self, call: CallState, kept: FittedSchedule | None, origin: str) -> Report:
        attention = "" if self._attention is None else str(self._attention)
        origin = origin or origin_of(self.config)
        return Report(call.records, self.config.to_dict(), kept=kept, origin=origin, attention=attention)

    def _show_report(self, caller: tuple[Any, int]) -> None:
        """The report of the call that has begun becomes the pipeline's."""
        self._report, self._reported = self._local.report, caller[1]

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

    def _on_first_method(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Where a pipeline's call first shows its arguments: a scheduler that was exchanged is noticed before it is
        given the call's timesteps."""
        caller = calling_pipeline()
        if caller[0] is self.pipe:
            if self.pipe.scheduler is not self._attachment.scheduler:
                self._follow_scheduler()
            arguments = arguments_of_call()
            self._local.given = caller, {name: arguments[name] for name in OWN_LEVELS if name in arguments}
            if self.listener is not None:
                self.listener.call_begins(caller, arguments)
        return inner(*args, **kwargs)

    def _follow_scheduler(self) -> None:
        """Takes over a scheduler that was exchanged since the last call.

        Raises:
            ConfigError: it has no converged picture, and the settings aim at that.
            UnsupportedPipelineError: its steps are of no known process, or it belongs to another pipeline.
        """
        check_aim(self.config, self.pipe.scheduler)
        self._attachment.follow_scheduler()

    def _on_set_timesteps(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Every pipeline call sets its timesteps once, before the loop: this is where a call begins."""
        caller = calling_pipeline()
        if not self._serves(caller[0]):
            return inner(*args, **kwargs)
        self._end_call()
        for name, module in denoisers(self.pipe, self.family).items():
            if module is not self._modules.get(name):
                raise UnsupportedPipelineError(f"{name} was exchanged after accelerate(): call accelerate(pipe) again.")
        check_parallel(self._modules, self.config.cache)
        result = inner(*args, **kwargs)
        self._attachment.keep_forwards_outermost()
        arguments = arguments_of_call()
        of, given = getattr(self._local, "given", (NOBODY, {}))
        if of == caller:
            arguments |= given
        found = self.kept.find(self.config, self._attachment.scheduler, arguments) if caller != NOBODY else None
        if self.config.has_target:  # not every machine need have the schedule, whose noise levels all ranks follow
            found = of_first_rank(found, unwrap_module(next(iter(self._modules.values()))))
        self._begin_call(caller, arguments, *(found or ()))
        if self.listener is not None:
            self.listener.steps_begin(self.kept.key(self.config, self._attachment.scheduler, arguments))
        call: CallState = self._local.call
        schedulers = [self._attachment.scheduler, *self._follow_companion(call)]
        if caller != NOBODY and not call.obstacle:
            for scheduler in schedulers:
                place_levels(scheduler, call.policy, arguments, of == caller and has_own_levels(given))
        return result

    def _follow_companion(self, call: CallState) -> list[Any]:
        """Follows the scheduler by which the pipeline's call steps a second output, a copy that it makes for itself.

        Without it the two would run apart: moved noise levels would reach one of them only.
        """
        name = self.family.companion_scheduler
        if not name:
            return []
        scheduler = local_of_call(name)
        if scheduler is None or not solves_the_flow(scheduler):
            call.obstacle = f"the call has no {name} that can be followed"
            return []
        # the copy ends with the call, and its patch with it
        MethodPatch(scheduler, "step", partial(self._on_companion_step, call, scheduler)).ensure_outermost()
        return [scheduler]

    def _on_progress_bar(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The loop of a pipeline call lies inside its progress bar, which closes however the loop ends."""
        bar, caller = inner(*args, **kwargs), calling_pipeline()
        if caller[0] is not self.pipe:
            return bar
        self._attachment.keep_forwards_outermost()
        if self.pipe.scheduler is not self._attachment.scheduler:
            self._follow_scheduler()
            self._begin_call(caller, arguments_of_call())
        call = self._current_call(caller)
        if call is None:
            return bar
        call.bar = CallBar(bar, self._end_call)
        return call.bar

    def _on_free_model_hooks(self, inner: Any) -> None:
        """Every pipeline call ends here, interrupted ones too. CPU offload takes all patches off the transformers then:
        without them, the next call would not notice a scheduler exchanged in between."""
        self._end_call()
        self._reported = 0  # the next call's frame may lie where this one's did
        inner()
        self._attachment.keep_forwards_outermost()
        if self.listener is not None:
            self.listener.call_ends(self.config, self._report)

    def _forward_handler(self, module: nn.Module) -> Any:
        # a coarse run exchanges parts of the transformer for its length, which no other thread's call may meet
        lock = threading.RLock()

        def handle(inner: Any, *args: Any, **kwargs: Any) -> Any:
            caller = calling_pipeline()
            with lock:
                if self.pipe.scheduler is not self._attachment.scheduler and (
                    caller == NOBODY or caller[0] is self.pipe
                ):
                    self._follow_scheduler()
                    self._begin_call(caller, arguments_of_call())
                call = self._current_call(caller)
                if call is None:
                    return inner(*args, **kwargs)
                return self._run(call, unwrap_module(module), inner, args, kwargs)

        return handle

    def _run(self, call: CallState, base: nn.Module, inner: Any, args: Any, kwargs: Any) -> Any:
        """Runs one transformer call of a step and remembers it."""
        family, executor, caches = self.family, self._executor, self._caches
        # transformers and pipelines change the dictionaries they share, and a later probe repeats this call
        bound = family.bind(args, kwargs)
        arguments = {name: dict(value) if isinstance(value, dict) else value for name, value in bound.items()}
        if call.record is None and call.is_stray(family, family.told_time(arguments)):
            return inner(*args, **kwargs)
        inputs, obstacle = None, caches.obstacles.get(id(base), "")
        try:
            inputs = divided(base, family.parse(base, arguments))
        except NotCoarseError as error:
            obstacle = str(error)
        if call.index == 0:  # of guidance, both calls: their texts need not be of one length
            check_even(base, inputs)
        if executor.watches:
            executor.refresh(base, inputs)
        if call.record is None:
            if call.index == 0:
                self._show_report(call.caller)
                call.start(self._attachment.scheduler, family, family.told_time(arguments))
                call.solver = self._solver(call)
                call.companion_solver = self._solver(call) if family.companion_scheduler else None
                call.ahead = self._ahead(call, family.told_time(arguments))
                check_finite(inputs)
            executed = "eager" if executor.graphs is None else "graph"
            call.begin_step(base, family, inputs, obstacle, executed)
        record, ordinal = call.record, call.calls
        assert record is not None
        call.calls += 1
        history, multiple = call.history(base, ordinal), record.multiple
        device = inputs.latent.device if inputs is not None else torch.device("cpu")
        # diffusers' caches keep a state per context
        cached = getattr(base, "is_cache_enabled", False)
        transformer_call = TransformerCall(
            base,
            arguments,
            inputs,
            call.index,
            call.steps,
            record.sigma,
            call.level(device),
            call.process_on(device),
            inner,
            caches.contexts(call, base, inner, ordinal) if cached else None,
            (family.graph_obstacle or _capture_obstacle(base, inner, cached)) if executor.graphs is not None else "",
            caches.teacache(call.cache_states, base, ordinal) if caches.teacaches else None,
            None if call.ahead is None else partial(call.ahead.of_step, base, call.index),
            None if call.text is None else call.text.of(call.index, ordinal, arguments["encoder_hidden_states"]),
        )
        # Guidance that begins in mid-run has a second call without a full step, where the first call has one. The
        # difference of the two counts for guidance, so that the second may lean on no less than the first.
        behind = self._path.anchors > 0 and bool(call.history(base, 0).anchors) and not history.anchors
        lost = ordinal > 0 and (behind or call.lost(history))
        joined = None if call.guidance is None else self._joined(call.guidance, call, transformer_call, ordinal)
        if inputs is None or multiple == 1 or lost or (multiple == SKIP and not history.recent):
            result = joined or executor.full(transformer_call)
            if ordinal > 0 and multiple != 1 and not record.note:
                record.note = f"call {ordinal + 1} of the step had no full one to start from, and ran full"
            # the last step has no successor to remember for
            if inputs is not None and call.remembers and not result.blocks_skipped:
                history.add_full(executor.anchor(transformer_call, result.output))
                if result.companion is not None:
                    history.add_companion(record.sigma, result.companion)
        elif multiple == SKIP or not self._path.calls_model:
            result = executor.skipped(transformer_call, history, multiple)
        else:
            result = joined or executor.coarse(transformer_call, history, multiple)
            if not result.blocks_skipped:
                assert result.prediction is not None
                history.add_run(record.sigma, result.prediction)
                if result.companion is not None:
                    history.add_companion(record.sigma, result.companion)
        call.add(result)
        return result.output

    def _joined(
        self, guidance: BatchedGuidance, call: CallState, one: TransformerCall, ordinal: int
    ) -> StepResult | None:
        """What a call comes to where the step's two calls run as one; None where it has to run by itself."""
        record = call.record
        assert record is not None
        if ordinal:
            found = guidance.further(one)
        else:
            histories = (call.history(one.base, 0), call.history(one.base, 1))
            found = guidance.first(one, histories, record.multiple)
        if guidance.reason and not record.note:
            record.note = f"guidance apart: {guidance.reason}"
        return found

    def _ahead(self, call: CallState, told: torch.Tensor) -> ModulationAhead | None:
        """Modulations made ahead, where the timesteps of the call are known; ``told`` is the first."""
        if self.config.modulation != "ahead" or not call.timesteps:
            return None
        made = ModulationAhead(self.family, call.timesteps, call.sigmas, self._path.told_level)
        return made if made.starts_at(told) else None

    def _solver(self, call: CallState) -> FlowSolver | None:
        """What moves the latent over skipped steps; None where the scheduler does, as it would over full ones."""
        if not (self.config.corrector and self.config.approximates and call.sigmas):
            return None
        if call.obstacle or not follows_the_flow(self._attachment.scheduler):
            return None
        return FlowSolver(self._attachment.scheduler, call.sigmas, self.config.aim)

    def _on_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._current_call(calling_pipeline())
        if call is None or call.record is None:
            return inner(*args, **kwargs)
        increment = None
        watcher, told = self.watcher, None
        if watcher is not None or self._watches or call.solver is not None:
            output, timestep, sample, given = _given_to_step(inner, args, kwargs)
        if watcher is not None:
            told = self._progress_of(call, output, sample)
        if self._watches or call.solver is not None:
            if self.config.approximates:  # what approximates nothing stays the plain pipeline's bit for bit
                inner = without_waiting(inner, self._attachment.scheduler, sample)
            step_from = _step_from(inner, self._attachment.scheduler, timestep, given)
            own_step = partial(step_from, output)
            made = (call.index, call.ran, call.source)
            if call.solver is None:
                result, increment = own_step(sample)
            elif call.process is None:
                result, increment = call.solver.step(*made, output, sample, own_step)
            else:
                levels = call.levels_around
                result, increment = solved_step(call.solver, call.process, levels, made, output, sample, step_from)
        else:
            result = inner(*args, **kwargs)
        call.end_step(increment if self._watches else None)
        if watcher is not None and told is not None:
            watcher(told)
        if call.index >= call.steps:
            self._end_call()
            if self._report is not None and self._report.steps is call.records:
                self._report.complete = True
        return result

    def _progress_of(self, call: CallState, output: torch.Tensor, sample: torch.Tensor) -> Progress:
        """What a watcher is told of the current step."""
        assert call.record is not None
        clean = partial(clean_latent, output, sample, call.sigma, call.process_on(sample.device), *call.layout)
        return Progress(call.index, call.steps, call.record.multiple, clean)

    def _on_companion_step(self, call: CallState, scheduler: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The step of a second output, after that of the latent: it was full, coarse or skipped as that one was."""
        if call.companion_solver is None or call.stepped is None:
            return inner(*args, **kwargs)
        output, timestep, sample, given = _given_to_step(inner, args, kwargs)
        own_step = partial(_step_from(inner, scheduler, timestep, given), output)
        return call.companion_solver.step(*call.stepped, output, sample, own_step)[0]


def _given_to_step(
    inner: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, Any, torch.Tensor, dict[str, Any]]:
    """Model output, timestep and latent of a call of a scheduler's ``step``, and the rest by name."""
    names = ("model_output", "timestep", "sample")
    given = {**dict(zip(names, args)), **kwargs}
    rest = args[len(names) :]
    output, timestep, sample = (given.pop(name) for name in names)
    if rest:  # all by name, so that the latent can come last
        given |= dict(zip(list(inspect.signature(inner).parameters)[len(names) :], rest))
    return output, timestep, sample, given


def _step_from(inner: Any, scheduler: Any, timestep: Any, given: dict[str, Any]) -> SchedulerStep:
    """A scheduler's step from any model output and latent, with the increment; arguments as of `_given_to_step`."""

    def step_from(output: torch.Tensor, latent: torch.Tensor) -> tuple[Any, torch.Tensor]:
        return step_with_increment(inner, scheduler, output, timestep, latent, **given)

    return step_from


def _capture_obstacle(base: nn.Module, inner: Any, cached: bool) -> str:
    """Why the transformer's forward cannot be captured, where that can be seen from outside it."""
    return "a cache of diffusers decides inside the transformer" if cached else wrapped_forward(inner, base)
