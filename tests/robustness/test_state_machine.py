"""Whatever users do to a pipeline, in whatever order: plain is plain, and accelerated is as a fresh pipeline is.

``DDIT_STATE_EXAMPLES`` sets how many sequences are tried (default 15); with it, what fails is also made smaller.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from shared_pipelines import (
    LORA,
    REQUESTS,
    SCHEDULERS,
    SETTINGS,
    accelerate,
    add_lora,
    call,
    derived,
    direct,
    expected,
    expected_direct,
    make,
    patches,
    scheduler,
)

import ddit_rt

EXAMPLES = os.environ.get("DDIT_STATE_EXAMPLES")
ERRORS = (RuntimeError, KeyboardInterrupt)

a_setting = st.sampled_from(sorted(SETTINGS))
a_request = st.sampled_from(REQUESTS)
a_step = st.integers(0, 2)


class Pipelines(RuleBasedStateMachine):
    """One pipeline, and what its user may do with it.

    Attributes:
        settings: Name of those the pipeline was accelerated with; None: it is plain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pipe = make()
        self.scheduler = "euler"
        self.settings: str | None = None
        self.lora = self.offloaded = False

    # -- what is expected -------------------------------------------------------------------------------------------

    def expected(self, name: str) -> tuple[torch.Tensor, list[int]]:
        return expected(self.settings, name, self.scheduler, self.lora)

    def told(self) -> bool:
        """Whether the pipeline was told to be accelerated."""
        return self.settings is not None

    def check(self, result: torch.Tensor, name: str) -> None:
        """The result is that of a fresh pipeline in the same settings, and the report is of this call."""
        wanted, schedule = self.expected(name)
        assert torch.equal(result, wanted), (self.settings, name)
        if self.told():
            report = ddit_rt.report(self.pipe)
            assert report.complete and report.schedule == schedule

    @invariant()
    def a_direct_call_of_the_transformer_is_plain(self) -> None:
        assert torch.equal(direct(self.pipe), expected_direct(self.lora))

    @invariant()
    def a_plain_pipeline_carries_no_patch(self) -> None:
        # offloading leaves forwards of its own
        if self.settings is None and not self.offloaded:
            assert not [name for name in patches(self.pipe) if name != "transformer.forward"]

    def teardown(self) -> None:
        self.check(call(self.pipe, "small"), "small")
        ddit_rt.restore(self.pipe)
        self.settings = None
        self.check(call(self.pipe, "small"), "small")

    # -- what users do ----------------------------------------------------------------------------------------------

    @initialize(name=a_setting, scheduler_name=st.sampled_from(SCHEDULERS))
    def begin(self, name: str, scheduler_name: str) -> None:
        self.exchange_scheduler(scheduler_name)
        self.accelerate(name)

    @rule(name=a_setting)
    def accelerate(self, name: str) -> None:
        assert accelerate(self.pipe, name) is self.pipe
        self.settings = name

    @rule()
    def restore(self) -> None:
        assert ddit_rt.restore(self.pipe) is self.pipe
        self.settings = None

    @rule(name=a_request)
    def call(self, name: str) -> None:
        self.check(call(self.pipe, name), name)

    @rule(name=a_request, step=a_step, error=st.sampled_from(ERRORS), place=st.sampled_from(["callback", "block"]))
    def interrupt(self, name: str, step: int, error: type[BaseException], place: str) -> None:
        ended: list[int] = []
        interrupted = False

        def at_step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            ended.append(index)
            if place == "callback" and index == step:
                raise error
            return {}

        def in_block(*_: Any) -> None:
            if len(ended) == step:
                raise error

        handle = None
        if place == "block":
            handle = self.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(in_block)
        try:
            call(self.pipe, name, callback_on_step_end=at_step_end)
        except ERRORS as raised:
            assert type(raised) is error
            interrupted = True
        else:
            # that step ran no block
            assert place == "block" and self.settings in ("teacache", "skips")
        finally:
            if handle is not None:
                handle.remove()
        if self.told():
            assert interrupted != ddit_rt.report(self.pipe).complete or step == 2

    @rule(name=st.sampled_from(SCHEDULERS))
    def exchange_scheduler(self, name: str) -> None:
        self.pipe.scheduler = scheduler(name)
        self.scheduler = name

    @precondition(lambda self: not self.lora)
    @rule()
    def load_lora(self) -> None:
        add_lora(self.pipe)
        self.lora = True

    @precondition(lambda self: self.lora)
    @rule()
    def unload_lora(self) -> None:
        self.pipe.transformer.delete_adapters(LORA)
        self.lora = False

    @precondition(lambda self: not self.offloaded)
    @rule()
    def offload(self) -> None:
        self.pipe.enable_model_cpu_offload(device="cpu")
        self.offloaded = True

    @precondition(lambda self: self.offloaded)
    @rule()
    def remove_offload(self) -> None:
        self.pipe.remove_all_hooks()
        self.offloaded = False

    @rule(name=a_request, inner=a_setting, step=a_step)
    def call_another_inside_a_callback(self, name: str, inner: str, step: int) -> None:
        other, results = accelerate(make(), inner), []

        def nested(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            if index == step:
                results.append(call(other, "small"))
            return {}

        self.check(call(self.pipe, name, callback_on_step_end=nested), name)
        assert torch.equal(results[0], expected(inner, "small", "euler", False)[0])

    @rule(name=a_request, beside=a_setting)
    def call_in_two_threads(self, name: str, beside: str) -> None:
        other = accelerate(make(), beside)
        results: dict[str, torch.Tensor] = {}
        threads = [
            threading.Thread(target=lambda: results.update(own=call(self.pipe, name))),
            threading.Thread(target=lambda: results.update(other=call(other, "small"))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(results["other"], expected(beside, "small", "euler", False)[0])
        self.check(results["own"], name)


class SharingPipelines(Pipelines):
    """Also pipelines made of the same components, which may take each other's place."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[tuple[Any, str, str]] = []  # pipeline, kind, scheduler
        self.owner: Any = None  # the pipeline that was accelerated last

    def told(self) -> bool:
        return super().told() and self.owner is self.pipe

    def check(self, result: torch.Tensor, name: str) -> None:
        if self.settings is None or self.owner is self.pipe:
            super().check(result, name)
        else:
            self.check_any(self.pipe, result, name, self.scheduler, None)

    def check_any(self, pipe: Any, result: torch.Tensor, name: str, scheduler_name: str, kind: str | None) -> None:
        """Accelerated if it was told so, else plain; or its report says how it ran."""
        plain = torch.equal(result, expected(None, name, scheduler_name, self.lora, kind)[0])
        wanted, schedule = expected(self.settings, name, scheduler_name, self.lora, kind)
        if self.settings is None or (plain and pipe is not self.owner):
            assert plain, (self.settings, name, kind)
            return
        assert torch.equal(result, wanted), (self.settings, name, kind)
        assert ddit_rt.report(pipe).complete and ddit_rt.report(pipe).schedule == schedule

    @rule(name=a_setting)
    def accelerate(self, name: str) -> None:
        super().accelerate(name)
        self.owner = self.pipe

    @precondition(lambda self: len(self.others) < 2)
    @rule(kind=st.sampled_from(["image", "twin"]))
    def make_another(self, kind: str) -> None:
        kind = "twin" if self.scheduler == "unipc" else kind  # which cannot begin with a picture
        self.others.append((derived(self.pipe, kind), kind, self.scheduler))

    @precondition(lambda self: self.others)
    @rule(name=a_setting, which=st.integers(0, 1))
    def accelerate_another(self, name: str, which: int) -> None:
        other = self.others[which % len(self.others)][0]
        assert accelerate(other, name) is other
        self.owner, self.settings = other, name

    @precondition(lambda self: self.others)
    @rule(which=st.integers(0, 1))
    def restore_another(self, which: int) -> None:
        ddit_rt.restore(self.others[which % len(self.others)][0])
        self.settings = None

    @precondition(lambda self: self.others)
    @rule(name=a_request, which=st.integers(0, 1))
    def call_another(self, name: str, which: int) -> None:
        other, kind, scheduler_name = self.others[which % len(self.others)]
        self.check_any(other, call(other, name), name, scheduler_name, kind)

    @precondition(lambda self: self.others and self.settings is not None and self.owner is self.pipe)
    @rule(name=a_request, which=st.integers(0, 1), step=a_step)
    def call_a_sharing_one_inside_a_callback(self, name: str, which: int, step: int) -> None:
        other, kind, scheduler_name = self.others[which % len(self.others)]
        if other.scheduler is self.pipe.scheduler:
            return  # plain pipelines spoil each other's steps, too

        def nested(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            if index == step:
                result = call(other, "small")
                assert torch.equal(result, expected(None, "small", scheduler_name, self.lora, kind)[0])
            return {}

        self.check(call(self.pipe, name, callback_on_step_end=nested), name)


def tried(machine: type[RuleBasedStateMachine]) -> None:
    phases = (Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(EXAMPLES or 15),
            stateful_step_count=10,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def test_whatever_is_done_to_a_pipeline_its_results_are_those_of_a_fresh_one() -> None:
    tried(Pipelines)


def test_whatever_is_done_to_pipelines_that_share_components_none_runs_coarse_unsaid() -> None:
    tried(SharingPipelines)
