"""The state of a call ends where the pipeline's call ends, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adapters import trained
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from shared_pipelines import transformer_call
from tiny import flux, flux_inputs, latents_of, picture, wan, wan_inputs

import ddit_rt
from ddit_rt.pipeline import find_accelerated

COARSE = (1, 1, 2, 4, 1, 4, 2, 2)

# how a call ends early: from the pipeline's own loop, and from inside the model
ERRORS = {"exception": RuntimeError, "keyboard": KeyboardInterrupt}
ENDS = [("exception", "callback"), ("keyboard", "callback"), ("exception", "block"), ("keyboard", "block")]


def interrupted(pipe: Any, inputs: dict[str, Any], error: type[BaseException], place: str, step: int) -> None:
    """Calls the pipeline; ``error`` ends the call at ``step``."""
    seen = []

    def at_step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        seen.append(index)
        if place == "callback" and index == step:
            raise error
        return {}

    def in_block(*_: Any) -> None:
        if len(seen) == step:
            raise error

    blocks = getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks
    hook = blocks[0].register_forward_pre_hook(in_block) if place == "block" else None
    try:
        with pytest.raises(error):
            latents_of(pipe, {**inputs, "callback_on_step_end": at_step_end})
    finally:
        if hook is not None:
            hook.remove()
    assert len(seen) == step + (place == "callback")


def wan_call() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
        "timestep": torch.tensor([500]),
    }


MODELS = {"flux": (flux, flux_inputs, transformer_call), "wan": (wan, wan_inputs, wan_call)}


@torch.no_grad()
def by_hand(pipe: Any, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    return pipe.transformer(**arguments).sample


def sibling(pipe: Any) -> Any:
    """A FLUX pipeline on the same transformer, with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = FluxPipeline(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


# -- after the call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, place", ENDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_direct_call_of_the_transformer_after_an_interrupted_call_is_plain(model, error, place):
    make, inputs, arguments = MODELS[model]
    pipe = make()
    plain = by_hand(pipe, arguments())
    with ddit_rt.accelerated(pipe, schedule=COARSE):
        # the next step would be a coarse one
        interrupted(pipe, inputs(), ERRORS[error], place, step=2 if place == "block" else 1)
        assert torch.equal(by_hand(pipe, arguments()), plain)


@pytest.mark.parametrize("error, place", ENDS[1:3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("step", [0, 5])
def test_the_next_call_is_that_of_a_fresh_pipeline(model, error, place, step):
    make, inputs, _ = MODELS[model]
    pipe = make()
    plain = latents_of(pipe, inputs())
    ddit_rt.accelerate(pipe, schedule=COARSE)
    fresh = latents_of(pipe, inputs())
    interrupted(pipe, inputs(), ERRORS[error], place, step)
    assert not ddit_rt.report(pipe).complete
    assert torch.equal(latents_of(pipe, inputs()), fresh)
    assert ddit_rt.report(pipe).complete
    interrupted(pipe, inputs(), ERRORS[error], place, step)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs()), plain)


@pytest.mark.parametrize("error", ERRORS)
def test_a_pipeline_on_the_same_transformer_is_plain_after_an_interrupted_call(error):
    pipe, inputs = flux(), flux_inputs()
    other = sibling(pipe)
    plain = latents_of(other, inputs)
    with ddit_rt.accelerated(pipe, schedule=COARSE):
        interrupted(pipe, inputs, ERRORS[error], "callback", step=1)
        assert torch.equal(latents_of(other, inputs), plain)


def test_a_pipeline_on_the_same_transformer_is_plain_after_a_whole_call():
    pipe, inputs = flux(), flux_inputs()
    other = sibling(pipe)
    plain = latents_of(other, inputs)
    with ddit_rt.accelerated(pipe, schedule=COARSE):
        latents_of(pipe, inputs)
        report = ddit_rt.report(pipe).to_dict()
        assert torch.equal(latents_of(other, inputs), plain)
        assert ddit_rt.report(pipe).to_dict() == report


# -- inside the call ------------------------------------------------------------------------------------------------


def test_a_pipeline_on_the_same_transformer_called_inside_a_callback_is_plain():
    pipe, inputs = flux(), flux_inputs()
    other, others = sibling(pipe), flux_inputs(steps=3)
    plain, results = latents_of(other, others), []

    def nested(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        results.append(latents_of(other, others))
        return {}

    with ddit_rt.accelerated(pipe, schedule=COARSE):
        alone = latents_of(pipe, inputs)
        assert torch.equal(latents_of(pipe, {**inputs, "callback_on_step_end": nested}), alone)
        assert ddit_rt.report(pipe).complete and ddit_rt.report(pipe).schedule == list(COARSE)
    assert len(results) == 8 and all(torch.equal(result, plain) for result in results)


def test_the_transformer_called_inside_a_callback_is_plain():
    pipe, inputs, arguments = flux(), flux_inputs(), transformer_call()
    plain, plain_call, results = by_hand(pipe, arguments), latents_of(pipe, inputs), []

    def nested(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        results.append(by_hand(pipe, arguments))
        return {}

    with ddit_rt.accelerated(pipe, schedule=COARSE):
        alone = latents_of(pipe, inputs)
        result = latents_of(pipe, {**inputs, "callback_on_step_end": nested})
        notes = [step.note for step in ddit_rt.report(pipe).steps]
    assert len(results) == 8 and all(torch.equal(result, plain) for result in results)
    # the pipeline's own steps run as ever, or full, and the report says so
    assert torch.equal(result, alone) or (torch.equal(result, plain_call) and all(notes[1:]))


def test_an_exception_of_a_nested_call_that_the_callback_catches_does_not_reach_the_outer_call():
    pipe, other, inputs = flux(), flux(), flux_inputs()

    def nested(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        interrupted(other, inputs, RuntimeError, "callback", step=3)
        return {}

    with ddit_rt.accelerated(pipe, schedule=COARSE), ddit_rt.accelerated(other, schedule=COARSE):
        alone = latents_of(pipe, inputs)
        assert torch.equal(latents_of(pipe, {**inputs, "callback_on_step_end": nested}), alone)
        assert torch.equal(latents_of(other, inputs), alone)


# -- beside the call ------------------------------------------------------------------------------------------------

PATHS = {
    "delta": {},
    "naive": {"coarse": "naive"},
    "adapter": {},
    "teacache": {"cache": ddit_rt.TeaCacheConfig(threshold=1e9, coefficients=(1.0, 0.0))},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_pipeline_on_the_same_transformer_in_another_thread_is_plain(path):
    pipe, inputs = flux(), flux_inputs()
    adapter = trained(pipe) if path == "adapter" else None
    other, others = sibling(pipe), flux_inputs(steps=2)
    plain, results, threads = latents_of(other, others), [], []
    main, turn = threading.get_ident(), threading.Lock()

    def work() -> None:
        try:
            with turn:  # one call at a time of the other pipeline, whose scheduler serves one
                results.append(torch.equal(latents_of(other, others), plain) or "another picture")
        except Exception as error:
            results.append(repr(error))

    def beside(*_: Any) -> None:
        """In the midst of the model, at every step: the other thread's call from beginning to end."""
        if threading.get_ident() == main:
            waits = not any(thread.is_alive() for thread in threads)
            threads.append(threading.Thread(target=work))
            threads[-1].start()
            # a call that waits for this one to end is fine, too
            threads[-1].join(timeout=1 if waits else 0)

    with ddit_rt.accelerated(pipe, adapter, schedule=COARSE, **PATHS[path]):
        alone = latents_of(pipe, inputs)
        with hooked(pipe.transformer.transformer_blocks[0], beside):
            together = latents_of(pipe, inputs)
            for thread in threads:
                thread.join()
    assert torch.equal(together, alone)
    assert len(results) >= 4 and set(results) == {True}


@contextmanager
def hooked(module: torch.nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(function, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_a_call_that_overlaps_a_coarse_step_of_another_thread_meets_no_adapter():
    """It embeds before the coarse step, runs the blocks in its midst, and is de-embedded after it."""
    pipe, inputs, arguments = flux(), flux_inputs(), transformer_call()
    plain, results = by_hand(pipe, arguments), []
    main = threading.get_ident()
    embedded, may_run, has_run, may_end = (threading.Event() for _ in range(4))

    def at_blocks(_: Any, __: Any, given: dict[str, Any]) -> None:
        if threading.get_ident() != main:
            embedded.set()
            may_run.wait(timeout=2)
        elif given["hidden_states"].shape[1] < 64 and not may_run.is_set():
            may_run.set()
            has_run.wait(timeout=1)

    def at_output(*_: Any) -> None:
        if threading.get_ident() != main:
            has_run.set()
            may_end.wait(timeout=2)

    with ddit_rt.accelerated(pipe, trained(pipe), schedule=COARSE):
        alone = latents_of(pipe, inputs)
        blocks, output = pipe.transformer.transformer_blocks[0], pipe.transformer.norm_out
        with hooked(blocks, at_blocks), hooked(output, at_output):
            thread = threading.Thread(target=lambda: results.append(by_hand(pipe, arguments)))
            thread.start()
            embedded.wait(timeout=5)
            together = latents_of(pipe, inputs)
            may_end.set()
            thread.join()
    assert torch.equal(together, alone)
    assert torch.equal(results[0], plain)


def test_a_call_in_another_thread_does_not_see_the_state_of_an_interrupted_one():
    pipe, inputs, arguments = flux(), flux_inputs(), transformer_call()
    plain, results = by_hand(pipe, arguments), []
    with ddit_rt.accelerated(pipe, schedule=COARSE):
        alone = latents_of(pipe, inputs)
        interrupted(pipe, inputs, RuntimeError, "callback", step=1)
        work = (lambda: results.append(by_hand(pipe, arguments)), lambda: results.append(latents_of(pipe, inputs)))
        for target in work:
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert torch.equal(results[0], plain) and torch.equal(results[1], alone)


# -- what report says -----------------------------------------------------------------------------------------------


def test_the_report_is_never_that_of_the_call_before():
    pipe, inputs = wan(euler=True), wan_inputs()
    pipe.enable_model_cpu_offload(device="cpu")
    ddit_rt.accelerate(pipe, schedule=lambda index, patch_std: COARSE[index % 8])
    latents_of(pipe, inputs)
    pipe.remove_all_hooks()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    result = latents_of(pipe, {**inputs, "num_inference_steps": 5})
    try:
        steps = len(ddit_rt.report(pipe).steps)
    except ddit_rt.DDiTError:
        steps = 0  # that call ran plain, and the error says so
    ddit_rt.restore(pipe)
    plain = latents_of(pipe, {**inputs, "num_inference_steps": 5})
    assert steps == (0 if torch.equal(result, plain) else 5)


def test_a_call_that_fails_before_its_first_step_leaves_no_report_of_the_one_before(monkeypatch):
    pipe, inputs = flux("image"), flux_inputs(steps=12, image=picture(), strength=0.6)
    ddit_rt.accelerate(pipe, speedup=2)
    latents_of(pipe, inputs)
    before = ddit_rt.report(pipe)

    def fails(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(pipe, "prepare_latents", fails)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no memory"):
            latents_of(pipe, inputs)
        assert ddit_rt.report(pipe) is not before and not ddit_rt.report(pipe).complete


def test_a_call_is_fitted_to_what_it_was_given_and_not_to_a_failed_one_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    pipe = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")
    ended = []

    class Learner:
        def call_ended(self, call):
            ended.append(call.arguments["max_sequence_length"])

    find_accelerated(pipe).listener.learner = Learner()
    for _ in range(3):
        with pytest.raises(ValueError, match="max_sequence_length"):
            latents_of(pipe, flux_inputs(steps=12, max_sequence_length=9999))
        latents_of(pipe, flux_inputs(steps=12, max_sequence_length=24))
    assert ended == [24] * 3
