"""The recorder sees what the pipeline computes, keeps what it is told to, and leaves the pipeline as it was."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import flux, flux_inputs, latents_of, negative, picture, wan, wan_image, wan_inputs

import ddit_rt
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.fitting import fit_teacache
from ddit_rt.pipeline import find_accelerated
from ddit_rt.runtime import MethodPatch
from ddit_rt.trajectories import Recorder, Shard, Step, StreamCall, record, record_trajectory

STEPS = 6


def watched(
    pipe: Any, inputs: dict[str, Any], **options: Any
) -> tuple[torch.Tensor, list[Step[StreamCall]], torch.Tensor | None]:
    """Noise levels, steps with everything in them, and what the pipeline returned."""
    returned: list[torch.Tensor] = []
    sigmas, steps = Recorder(pipe, family_of(pipe)).record(
        lambda: returned.append(latents_of(pipe, inputs)), lambda call: call, lambda step: step, **options
    )
    return sigmas, steps, returned[0] if returned else None


def is_plain(pipe: Any) -> bool:
    return "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__


def beyond_coarse(pipe: Any) -> Any:
    """Position ids of every second row, which coarse tokens cannot carry."""
    own = pipe._prepare_latent_image_ids
    pipe._prepare_latent_image_ids = lambda *a, **k: own(*a, **k) * torch.tensor([1.0, 2.0, 1.0])
    return pipe


def counted(pipe: Any) -> list[int]:
    """One entry per call of the transformer."""
    calls: list[int] = []
    MethodPatch(
        pipe.transformer, "forward", lambda inner, *a, **k: calls.append(1) or inner(*a, **k)
    ).ensure_outermost()
    return calls


def test_steps_are_those_of_the_pipeline() -> None:
    pipe, inputs = flux(), negative(flux_inputs(steps=STEPS), scale=3.0)
    alone = latents_of(pipe, inputs)
    sigmas, steps, returned = watched(pipe, inputs)
    assert returned is not None and torch.equal(returned, alone) and torch.equal(steps[-1].next_latents, alone)
    assert [step.index for step in steps] == list(range(STEPS)) and sigmas.shape == (STEPS + 1,)
    for step, following in pairwise(steps):
        assert torch.equal(step.next_latents, following.latents)
    for step, (sigma, next_sigma) in zip(steps, pairwise(sigmas)):
        assert step.sigma == float(sigma) and step.timestep == pytest.approx(1000 * step.sigma)
        torch.testing.assert_close(step.next_latents, step.latents + (next_sigma - sigma) * step.output)
        assert [(call.step, call.stream) for call in step.calls] == [(step.index, 0), (step.index, 1)]
        assert all(call.arguments["hidden_states"] is step.latents for call in step.calls)
        conditional, unconditional = (call.prediction for call in step.calls)
        torch.testing.assert_close(step.output, unconditional + 3.0 * (conditional - unconditional))
    prompts = [call.arguments["encoder_hidden_states"] for call in steps[0].calls]
    assert torch.equal(prompts[0], -prompts[1])
    assert is_plain(pipe)


def test_a_part_of_a_run_is_its_beginning_and_runs_no_further() -> None:
    pipe, inputs = flux(), flux_inputs(steps=STEPS)
    whole, part = watched(pipe, inputs), watched(pipe, inputs, max_steps=2)
    assert torch.equal(part[0], whole[0][:3]) and len(part[1]) == 2 and part[2] is None
    assert all(torch.equal(a.next_latents, b.next_latents) for a, b in zip(part[1], whole[1]))
    assert is_plain(pipe)
    calls = counted(pipe)
    watched(pipe, inputs, max_steps=2)
    assert len(calls) == 2
    with pytest.raises(ddit_rt.ConfigError, match="max_steps=0"):
        watched(pipe, inputs, max_steps=0)


@pytest.mark.parametrize("told", [True, False])
def test_image_to_image_begins_in_the_middle(told: bool) -> None:
    """Whether or not the pipeline tells its scheduler where it begins."""
    pipe = flux("image")
    if not told:
        pipe.scheduler.set_begin_index = lambda begin_index=0: None
    sigmas, steps, _ = watched(pipe, flux_inputs(steps=STEPS, image=picture(), strength=0.5))
    assert len(steps) == STEPS // 2 and torch.equal(sigmas, pipe.scheduler.sigmas[STEPS // 2 :])
    assert [step.timestep for step in steps] == pytest.approx([1000 * float(sigma) for sigma in sigmas[:-1]])


def test_two_transformers_make_a_step_each() -> None:
    pipe = wan(two=True, euler=True)
    _, steps, _ = watched(pipe, wan_inputs(steps=STEPS))
    places = [step.transformer for step in steps]
    assert places == sorted(places) and set(places) == {0, 1}
    modules = [pipe.transformer, pipe.transformer_2]
    assert all(call.module is modules[step.transformer] for step in steps for call in step.calls)


def test_a_call_that_coarse_tokens_cannot_carry_ends_before_the_model_runs() -> None:
    pipe, inputs = beyond_coarse(flux()), flux_inputs(steps=STEPS)
    calls = counted(pipe)
    with pytest.raises(NotCoarseError, match="no plain grid"):
        watched(pipe, inputs)
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match=r"cannot be distilled: .*no plain grid"):
        record(pipe, family_of(pipe), lambda: latents_of(pipe, inputs), ["a"])
    arguments = {name: value for name, value in inputs.items() if name not in ("generator", "output_type")}
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match=r"no schedule can be fitted .*no plain grid"):
        record_trajectory(pipe, 0, **arguments)
    assert not calls and "step" not in pipe.scheduler.__dict__


def test_teacache_is_fitted_to_calls_that_coarse_tokens_cannot_carry() -> None:
    found = []
    for pipe in (flux(), beyond_coarse(flux())):
        pipe.encode_prompt = lambda *a, **k: (*(torch.ones(1, *shape) for shape in ((5, 24), (12,))), torch.zeros(5, 3))
        found.append(fit_teacache(pipe, ["a"], height=64, width=64, num_inference_steps=8))
    assert [len(fit.streams[0]) for fit in found] == [7, 7]


def test_an_accelerated_pipeline_is_made_plain() -> None:
    pipe, inputs = flux(), flux_inputs(steps=STEPS)
    alone = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=[1, 1, 2, 2, 2, 2])
    _, steps, _ = watched(pipe, inputs)
    assert torch.equal(steps[-1].next_latents, alone)
    assert find_accelerated(pipe) is None and is_plain(pipe)


def test_a_run_of_something_else_is_refused() -> None:
    pipe, other = flux(), flux()
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match=r"nothing to record: .* FluxPipeline's scheduler"):
        Recorder(pipe, family_of(pipe)).record(
            lambda: latents_of(other, flux_inputs(steps=2)), lambda call: None, lambda step: None
        )


def test_an_error_in_a_run_leaves_the_pipeline_plain() -> None:
    pipe = flux()

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(pipe, flux_inputs(steps=STEPS, callback_on_step_end=interrupt))
    assert is_plain(pipe)


def test_guidance_for_part_of_a_run_cannot_be_distilled() -> None:
    def no_more_guidance(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            pipe._guidance_scale = 1.0
        return tensors

    pipe = wan(euler=True)
    inputs = wan_inputs(steps=STEPS, callback_on_step_end=no_more_guidance)
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match=r"step 3 calls the transformer 1 times, step 0 did 2"):
        record(pipe, family_of(pipe), lambda: latents_of(pipe, inputs), ["a"])


def test_a_recording_on_disk_is_read_piece_by_piece(tmp_path: Any) -> None:
    pipe = wan_image()
    inputs = wan_inputs(steps=STEPS, image=picture(64, 96))
    recording = record(pipe, family_of(pipe), lambda: latents_of(pipe, inputs), ["a"], max_steps=3)
    recording.save(tmp_path / "shard.safetensors", torch.float32)
    shard = Shard(tmp_path / "shard.safetensors")
    assert (shard.steps, shard.batch, shard.streams) == (3, 1, 2) and torch.equal(shard.sigmas, recording.sigmas)
    assert torch.equal(shard.latent(1, 0), recording.latents[1, 0])
    for stream in range(2):
        assert torch.equal(shard.prediction(stream, 2, 0), recording.predictions[stream][2, 0])
        own = shard.arguments(stream, 0, frozenset({"timestep"}))
        assert own.keys() == recording.arguments[stream].keys() and "hidden_states" not in own
        assert torch.equal(own["encoder_hidden_states"], recording.arguments[stream]["encoder_hidden_states"][0])
        assert torch.equal(own["timestep"], recording.arguments[stream]["timestep"])
    condition = shard.condition(0)
    assert condition is not None and recording.condition is not None and condition.shape[0] == 8
    assert torch.equal(condition, recording.condition[0])
