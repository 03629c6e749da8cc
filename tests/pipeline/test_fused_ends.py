"""Coarse steps between fused ends: as exact as those in PyTorch, in few launches, and plain where they cannot be."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adapters import trained
from cases import ALL
from ddit_kernels._common import HAS_TRITON, INTERPRETED, Launch
from recorded import recorded
from tiny import flux, flux_inputs, latents_of, wan, wan_inputs
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import ddit_rt
from ddit_rt.families import denoisers, family_of
from ddit_rt.granularity import BandEnds, FusedEnds, PathOptions, PredictionHistory, make_path
from ddit_rt.pipeline.executor import StepExecutor
from ddit_rt.pipeline.transformer_call import TransformerCall

needs_kernels = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="runs with TRITON_INTERPRET=1 on a CPU")
SCHEDULE = (1, 1, 2, 4, 1, 2)
DTYPES = [torch.float32, torch.bfloat16]
PATHS = ["band-split", "delta", "naive", "adapter", "adapter-delta"]
CALLS = {
    "flux": lambda dtype: (flux(dtype=dtype), flux_inputs(dtype=dtype)),
    "flux-odd": lambda dtype: (flux(dtype=dtype), flux_inputs(height=72, width=40, batch=2, dtype=dtype)),
    "wan-odd": lambda dtype: (wan(dtype=dtype), wan_inputs(height=48, width=80, guidance_scale=1.0, dtype=dtype)),
    "wan-image": lambda dtype: ALL["wan-image"](),
}


class Steps:
    """Consecutive transformer calls of a plain pipeline call, and what executes them again, in any dtype."""

    def __init__(self, name: str, dtype: torch.dtype, coarse: str) -> None:
        pipe, inputs = CALLS[name](dtype)
        self.family = family_of(pipe)
        self.module = next(iter(denoisers(pipe, self.family).values()))
        seen: list[dict[str, Any]] = []
        handle = self.module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(self.family.bind(args, kwargs)), with_kwargs=True
        )
        latents_of(pipe, inputs)
        handle.remove()
        every = 2 if name == "wan-image" else 1  # guidance calls the transformer twice a step
        self.arguments = seen[: 3 * every : every]
        self.adapter = trained(pipe, targets=("feed-forward",)) if coarse.startswith("adapter") else None
        self.coarse = coarse

    def cast(self, dtype: torch.dtype) -> Steps:
        """The same numbers in another dtype."""
        other = copy.copy(self)
        other.module, other.adapter = copy.deepcopy((self.module, self.adapter))
        other.module.to(dtype)
        other.arguments = [
            {name: value.to(dtype) if _floating(value) else value for name, value in arguments.items()}
            for arguments in self.arguments
        ]
        return other

    def executor(self, backend: str) -> StepExecutor:
        path = make_path(self.coarse, PathOptions(adapter=self.adapter))
        return StepExecutor(self.family, path, True, None, (), backend)

    def call(self, index: int, sigma: float, inner: Callable[..., Any] | None = None) -> TransformerCall:
        arguments, level = self.arguments[index], torch.tensor(sigma, dtype=torch.float64)
        inputs = self.family.parse(self.module, arguments)
        run = inner or self.module.forward
        return TransformerCall(self.module, arguments, inputs, index, 3, sigma, level, None, run)

    @torch.no_grad()
    def remembered(self, executor: StepExecutor) -> PredictionHistory:
        """Two full steps."""
        history = PredictionHistory()
        for index, sigma in enumerate((0.95, 0.85)):
            call = self.call(index, sigma)
            if executor.watches:
                executor.refresh(self.module, call.inputs)
            history.add_full(executor.anchor(call, executor.full(call).output))
        return history

    @torch.no_grad()
    def coarse_step(self, backend: str, multiple: int) -> Any:
        executor = self.executor(backend)
        return executor.coarse(self.call(2, 0.7), self.remembered(executor), multiple)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cases() -> Iterator[Any]:
    """All of them; each takes the interpreter seconds, and some tell what all do."""
    chosen = {("flux-odd", path, torch.bfloat16, 2) for path in PATHS}
    chosen |= {("wan-odd", path, torch.float32, 4) for path in PATHS}
    chosen |= {("flux-odd", "delta", torch.float32, 4), ("wan-odd", "delta", torch.bfloat16, 2)}
    chosen |= {("wan-image", path, torch.float32, 2) for path in ("delta", "adapter")}
    for case in itertools.product(CALLS, PATHS, DTYPES, (2, 4)):
        if case[0] == "wan-image" and case[2] != torch.float32:
            continue  # the tiny image-to-video pipeline is float32
        yield pytest.param(*case, marks=() if case in chosen else pytest.mark.thorough)


@needs_kernels
@pytest.mark.parametrize("name, coarse, dtype, multiple", cases())
def test_fused_steps_are_as_exact_as_those_in_pytorch(name, coarse, dtype, multiple):
    steps = Steps(name, dtype, coarse)
    exact = steps.cast(torch.float64).coarse_step("torch", multiple).prediction
    plain, fused = (steps.coarse_step(backend, multiple) for backend in ("torch", "triton"))
    assert fused.fused and not plain.fused
    assert fused.prediction.shape == plain.prediction.shape and fused.prediction.dtype == torch.float32
    allowed = 2 * (plain.prediction - exact).abs().max()
    # the reference itself is kept in float32; the interpreter truncates to bfloat16 where hardware rounds
    allowed += exact.abs().max() * (2e-6 if dtype == torch.float32 else 2.0**-7)
    assert (fused.prediction - exact).abs().max() <= allowed


# -- launches ---------------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch outside the transformer: operations that make no view and no empty memory, and
    kernels. What the transformer's forward does itself counts apart, its two ends excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.within: list[str] = []
        self.inside = False

    def add(self, name: str) -> None:
        (self.within if self.inside else self.outside).append(name)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, schema = function.name(), function._schema
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
        # of our operations counts what they launch, not that they were called
        view |= name in ("aten::detach", "aten::_unsafe_view")
        if not view and "empty" not in name and not name.startswith("ddit::"):
            self.add(name)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def at(self, inside: bool) -> Iterator[None]:
        before, self.inside = self.inside, inside
        try:
            yield
        finally:
            self.inside = before


def counted(steps: Steps, backend: str, multiple: int, monkeypatch: Any) -> Launches:
    """The launches of one coarse step, its probe made before."""
    launches = Launches()

    def spied(inside: bool, function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            with launches.at(inside):
                return function(*args, **kwargs)

        return spy

    def run(self: Launch, device: torch.device) -> None:
        launches.add("kernel")
        with _disable_current_modes():
            original(self, device)

    def contiguous(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_contiguous():
            launches.add("copy")  # in front of a kernel no mode sees it
        return copied(self, *args, **kwargs)

    executor = steps.executor(backend)
    history = steps.remembered(executor)
    with torch.no_grad():
        executor.coarse(steps.call(2, 0.7), history, multiple)  # positions are made and residuals known
        original = Launch.run
        monkeypatch.setattr(Launch, "run", run)
        copied = torch.Tensor.contiguous
        monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
        for ends in (BandEnds, FusedEnds):
            for name in ("read", "write"):
                monkeypatch.setattr(ends, name, spied(False, getattr(ends, name)))
        with launches:
            call = steps.call(2, 0.7, spied(True, steps.module.forward))
            result = executor.coarse(call, history, multiple)
    assert result.fused == (backend == "triton")
    return launches


# in PyTorch they make 45 to 50, and 90 with an adapter; its residual block and the unit of its line come on top
LIMITS = {"band-split": 8, "delta": 8, "adapter": 17}


@needs_kernels
@pytest.mark.parametrize(
    "name, coarse, multiple",
    [
        ("flux", "delta", 2),
        ("flux-odd", "band-split", 4),
        ("wan-odd", "delta", 4),
        ("wan-odd", "band-split", 2),
        ("flux-odd", "adapter", 2),
    ],
)
def test_a_coarse_step_makes_few_launches_outside_the_transformer(name, coarse, multiple, monkeypatch):
    steps = Steps(name, torch.bfloat16, coarse)
    launches = counted(steps, "triton", multiple, monkeypatch)
    assert launches.within  # the transformer was seen
    assert len(launches.outside) <= LIMITS[coarse], launches.outside


# -- whole pipelines --------------------------------------------------------------------------------------------------


def run(pipe: Any, inputs: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, list[str]]:
    with ddit_rt.accelerated(pipe, **settings):
        latents = latents_of(pipe, inputs)
        return latents, [step.kernels for step in ddit_rt.report(pipe).steps]


@needs_kernels
@pytest.mark.parametrize("name", ["flux-true-cfg", "wan-odd"])
def test_the_report_says_which_kernels_a_step_used(name):
    pipe, inputs = ALL[name]()
    inputs["num_inference_steps"] = 6
    schedule = (1, 1, 2, 4, 0, 2)
    fused, kernels = run(pipe, inputs, schedule=schedule, backend="triton")
    assert kernels == ["torch", "torch", "fused", "fused", "", "fused"]
    plain, kernels = run(pipe, inputs, schedule=schedule)
    assert kernels == ["torch", "torch", "torch", "torch", "", "torch"]
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)
    assert not torch.equal(fused, plain)


@needs_kernels
@pytest.mark.parametrize("name", ["flux-odd", "wan-image"])
def test_full_steps_may_be_fused_too(name):
    pipe, inputs = ALL[name]()
    inputs["num_inference_steps"] = 3
    plain = latents_of(pipe, inputs)
    fused, kernels = run(pipe, inputs, threshold=0, backend="triton", fused_full=True)
    assert kernels == ["fused"] * 3
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    unfused, kernels = run(pipe, inputs, threshold=0, backend="triton")
    assert kernels == ["torch"] * 3 and torch.equal(unfused, plain)


@needs_kernels
@pytest.mark.parametrize("coarse", ["delta", pytest.param("adapter", marks=pytest.mark.thorough)])
def test_a_captured_graph_replays_them(coarse):
    pipe, inputs = flux(), flux_inputs(steps=6)
    settings = {"schedule": SCHEDULE, "backend": "triton"}
    if coarse == "adapter":
        settings["adapter"] = trained(pipe)
    wanted, _ = run(pipe, inputs, **settings)
    recording = recorded(pipe, **settings)
    assert torch.equal(latents_of(pipe, inputs), wanted)
    captures = recording.captures
    other = {**inputs, "generator": torch.Generator().manual_seed(2)}
    second = latents_of(pipe, other)
    steps = ddit_rt.report(pipe).steps
    assert recording.captures == captures and {step.executed for step in steps} == {"graph"}
    assert [step.kernels for step in steps if step.multiple > 1] == ["fused"] * 3
    ddit_rt.restore(pipe)
    assert torch.equal(run(pipe, other, **settings)[0], second)


# -- where they cannot be ---------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    "what, reason",
    [("float64", "not torch.float64"), ("hook", "hooks"), ("lora", "no plain layer"), ("autocast", "autocast")],
)
def test_a_step_that_cannot_be_fused_runs_in_pytorch_and_the_log_says_why(what, reason, caplog):
    pipe, inputs = flux(), flux_inputs(steps=6)
    if what == "float64":
        pipe, inputs = flux(dtype=torch.float64), flux_inputs(steps=6, dtype=torch.float64)
    if what == "hook":
        pipe.transformer.x_embedder.register_forward_hook(lambda *_: None)
    if what == "lora":
        from peft import LoraConfig

        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["x_embedder"]))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast")
    with autocast, caplog.at_level(logging.WARNING):
        wanted, _ = run(pipe, inputs, schedule=SCHEDULE)
        # the evolution's kernels take no float64 either, and are not what is asked here
        settings = {"multiples": (1, 2, 4), "schedule": SCHEDULE}
        with monkeypatched_backend():
            found, kernels = run(pipe, inputs, **settings)
    assert kernels == ["torch"] * 6 and torch.equal(found, wanted)
    assert sum(reason in record.getMessage() for record in caplog.records) == 1


@contextmanager
def monkeypatched_backend() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIT_BACKEND", "triton")
        yield


@needs_kernels
def test_patches_that_span_frames_run_in_pytorch(caplog):
    pipe, inputs = wan(), wan_inputs(steps=4, guidance_scale=1.0)
    settings = {"schedule": (1, 1, 22, 2), "multiples": (1, 2, 22), "backend": "triton"}
    with caplog.at_level(logging.WARNING):
        _, kernels = run(pipe, inputs, **settings)
    assert kernels == ["torch", "torch", "torch", "fused"]
    assert sum("span frames" in record.getMessage() for record in caplog.records) == 1
