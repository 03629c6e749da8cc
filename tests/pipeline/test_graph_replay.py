"""Whole pipelines through graphs: the same bits as eagerly, whatever users change in between."""

import logging

import pytest
import torch
from adapters import trained
from cases import ALL
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from recorded import recorded
from tiny import flux, flux_inputs, latents_of, negative, wan, wan_inputs

import ddit_rt

SCHEDULE = (1, 1, 2, 4, 1, 2, 4, 2)


def eager(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, **settings):
        return latents_of(pipe, inputs)


def executed(pipe):
    return [step.executed for step in ddit_rt.report(pipe).steps]


@pytest.mark.parametrize(
    "coarse, positions",
    [("delta", "native"), ("band-split", "interpolated"), ("naive", "native"), ("naive", "interpolated")],
)
@pytest.mark.parametrize("name", ["flux-odd", "wan-image"])
def test_replays_are_eager_execution_bit_for_bit(name, coarse, positions):
    pipe, inputs = ALL[name]()
    settings = {"coarse": coarse, "positions": positions, "schedule": SCHEDULE}
    wanted = eager(pipe, inputs, **settings)
    recording = recorded(pipe, **settings)
    assert torch.equal(latents_of(pipe, inputs), wanted)
    captures = recording.captures
    other = {**inputs, "generator": torch.Generator().manual_seed(2)}
    second = latents_of(pipe, other)
    assert recording.captures == captures and set(executed(pipe)) == {"graph"}
    ddit_rt.restore(pipe)
    assert not recording.live
    assert torch.equal(eager(pipe, other, **settings), second) and not torch.equal(second, wanted)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["flux-odd", "wan-image"])
def test_replays_with_an_adapter_are_eager_execution_bit_for_bit(name, merge):
    pipe, inputs = ALL[name]()
    settings = {"adapter": trained(pipe, targets=("feed-forward", "attention")), "merge_adapter": merge}
    settings["schedule"] = SCHEDULE
    wanted = eager(pipe, inputs, **settings)
    recording = recorded(pipe, **settings)
    assert torch.equal(latents_of(pipe, inputs), wanted) and set(executed(pipe)) == {"graph"}
    captures = recording.captures
    for block in getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks:
        for weight in block.parameters():
            weight.detach().mul_(1.1)
    changed = latents_of(pipe, inputs)
    assert recording.captures == captures and set(executed(pipe)) == {"graph"}
    ddit_rt.restore(pipe)
    assert torch.equal(eager(pipe, inputs, **settings), changed) and not torch.equal(changed, wanted)


def test_fine_steps_are_the_plain_pipeline_bit_for_bit():
    for pipe, inputs in (ALL["flux-true-cfg"](), ALL["wan-two"]()):
        plain = latents_of(pipe, inputs)
        recorded(pipe, threshold=0)
        assert torch.equal(latents_of(pipe, inputs), plain)
        assert set(executed(pipe)) == {"graph"}


def test_one_graph_per_size_serves_both_calls_of_guidance():
    pipe, inputs = flux(), negative(flux_inputs())
    recording = recorded(pipe, schedule=SCHEDULE)
    latents_of(pipe, inputs)
    assert recording.captures == 5  # full; the model at 2p and 4p; a probe at each
    latents_of(pipe, inputs)
    assert recording.captures == 5


def test_sizes_of_picture_and_batch_have_their_own_graphs_within_the_limit():
    pipe = flux()
    recording = recorded(pipe, schedule=SCHEDULE, max_graphs=7)
    for inputs in (flux_inputs(), flux_inputs(batch=2), flux_inputs(height=48), flux_inputs()):
        result = latents_of(pipe, inputs)
    assert len(recording.live) == 7 and recording.captures == 20
    ddit_rt.restore(pipe)
    assert torch.equal(result, eager(pipe, flux_inputs(), schedule=SCHEDULE))


def test_nothing_grows_over_many_calls():
    pipe, inputs = flux(), flux_inputs()
    recording = recorded(pipe, threshold=0.3)
    for _ in range(5):
        latents_of(pipe, inputs)
    assert recording.captures == len(recording.live) <= 4


# -- what users change after the capture ----------------------------------------------------------------------------


def lora(pipe, name="style"):
    config = LoraConfig(r=2, target_modules=["to_q", "x_embedder", "proj_out"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    for path, parameter in pipe.transformer.named_parameters():
        if f".{name}." in path:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    pipe.transformer.requires_grad_(False)


def moved(pipe):
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data * 1.5


CHANGES = {
    "loading a LoRA": lora,
    "weights that move": moved,
    "weights in place": lambda pipe: pipe.transformer.proj_out.weight.mul_(2),
    "fusing": lambda pipe: (lora(pipe), pipe.transformer.fuse_lora(lora_scale=0.5)),
    "switching off": lambda pipe: (lora(pipe), pipe.transformer.disable_adapters()),
    "a scale": lambda pipe: (lora(pipe), pipe.transformer.set_adapters(["style"], weights=[0.25])),
    "unloading": lambda pipe: (lora(pipe), pipe.transformer.unload_lora()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_capture_shows_in_the_picture(name):
    inputs = flux_inputs(steps=4)
    pipe, other = flux(), flux()
    recorded(pipe, schedule=SCHEDULE[:4])
    latents_of(pipe, inputs)
    CHANGES[name](pipe)
    CHANGES[name](other)
    changed = latents_of(pipe, inputs)
    assert set(executed(pipe)) == {"graph"}
    assert torch.equal(changed, eager(other, inputs, schedule=SCHEDULE[:4]))


def test_a_lora_switched_in_mid_run_and_back_needs_no_third_capture():
    inputs = flux_inputs()
    pipe, other = flux(), flux()
    for one in (pipe, other):
        lora(one)

    def switch(pipe, index, timestep, tensors):
        (pipe.transformer.disable_adapters if index % 2 else pipe.transformer.enable_adapters)()
        return {}

    wanted = eager(other, {**inputs, "callback_on_step_end": switch}, coarse="naive", schedule=SCHEDULE)
    recording = recorded(pipe, coarse="naive", schedule=SCHEDULE)
    assert torch.equal(latents_of(pipe, {**inputs, "callback_on_step_end": switch}), wanted)
    captures = recording.captures
    pipe.transformer.enable_adapters()
    assert torch.equal(latents_of(pipe, {**inputs, "callback_on_step_end": switch}), wanted)
    assert recording.captures == captures


def test_a_lora_scale_passed_with_the_call_selects_the_graph():
    pipe = flux()
    lora(pipe)
    results = {}
    recording = recorded(pipe, schedule=SCHEDULE)
    for scale in (0.5, 1.0, 0.5):
        results[scale] = latents_of(pipe, flux_inputs(joint_attention_kwargs={"scale": scale}))
    assert recording.captures == 10
    ddit_rt.restore(pipe)
    for scale, result in results.items():
        inputs = flux_inputs(joint_attention_kwargs={"scale": scale})
        assert torch.equal(result, eager(pipe, inputs, schedule=SCHEDULE))


@pytest.mark.parametrize("coarse", ["delta", "naive"])
@pytest.mark.parametrize("make, inputs", [(flux, negative(flux_inputs(steps=12))), (wan, wan_inputs(steps=12))])
@pytest.mark.parametrize("threshold", [1e-6, 0.5, 1e9])
def test_teacache_decides_between_graphs(make, inputs, threshold, coarse):
    pipe, schedule = make(), [1, 1, 1, 2, 2, 2, 1, 4, 4, 4, 1, 1]
    settings = {"schedule": schedule, "coarse": coarse, "cache": ddit_rt.TeaCacheConfig(threshold, (1.0, 0.0))}
    with ddit_rt.accelerated(pipe, **settings):
        wanted, decided = latents_of(pipe, inputs), executed(pipe)
    recording = recorded(pipe, **settings)
    for _ in range(2):
        assert torch.equal(latents_of(pipe, inputs), wanted)
        assert executed(pipe) == ["graph" if one == "eager" else one for one in decided]
        captures = recording.captures
    if threshold == 1e9:
        # signal, run and skip at each size; at the coarse ones of delta also a probe, which no cache sees
        assert captures == 9 + (2 if coarse == "delta" else 0) and decided.count("cached") == 6
    if threshold == 1e-6:
        assert "cached" not in decided


# -- what runs eagerly ----------------------------------------------------------------------------------------------


def test_a_cache_of_diffusers_runs_eagerly_and_says_so(caplog):
    pipe, inputs = flux(), flux_inputs()
    settings = {"schedule": SCHEDULE, "cache": FirstBlockCacheConfig(threshold=0.5)}
    wanted = eager(pipe, inputs, **settings)
    recording = recorded(pipe, **settings)
    with caplog.at_level(logging.WARNING, logger="ddit_rt"):
        for _ in range(2):
            assert torch.equal(latents_of(pipe, inputs), wanted)
    assert set(executed(pipe)) == {"eager"} and not recording.captures
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "cache of diffusers" in caplog.text


def test_offloading_runs_eagerly_and_graphs_come_back_without_it():
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    pipe, inputs = wan(), wan_inputs(steps=4)
    wanted = eager(pipe, inputs, schedule=SCHEDULE[:4])
    recorded(pipe, schedule=SCHEDULE[:4])
    add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))
    assert torch.equal(latents_of(pipe, inputs), wanted) and set(executed(pipe)) == {"eager"}
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(latents_of(pipe, inputs), wanted) and set(executed(pipe)) == {"graph"}


def test_free_steps_are_no_model_calls():
    pipe = flux()
    recorded(pipe, schedule=[1, 1, 0, 2])
    latents_of(pipe, flux_inputs(steps=4))
    assert executed(pipe) == ["graph", "graph", "cached", "graph"]


def test_graphs_demanded_without_a_device_name_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ddit_rt.ConfigError, match=r"cuda_graphs=True.*'auto' or False"):
        ddit_rt.accelerate(flux(), cuda_graphs=True)
    for setting in ("auto", False):
        pipe = ddit_rt.accelerate(flux(), cuda_graphs=setting)
        latents_of(pipe, flux_inputs(steps=2))
        assert executed(pipe) == ["eager"] * 2


# -- compilers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, how, coarse", [("flux", "blocks", "naive"), ("flux", "whole", "delta"), ("wan", "whole", "naive")]
)
def test_compiled_transformers_give_the_uncompiled_result(name, how, coarse, fresh_compiler):
    settings = {"coarse": coarse, "schedule": (1, 1, 2, 4, 1)}
    pipe, inputs = ALL[name]()
    inputs["num_inference_steps"] = 5
    wanted = eager(pipe, inputs, **settings)
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(eager(pipe, inputs, **settings), wanted)
    assert torch.equal(latents_of(pipe, inputs), latents_of(pipe, inputs))


def test_a_transformer_compiled_in_place_is_refused():
    pipe = flux()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="compile_repeated_blocks"):
        ddit_rt.accelerate(pipe)


def test_naive_embeddings_follow_changed_weights() -> None:
    schedule = [1, 1, 2, 4, 1, 2, 2, 1]
    pipe, other = flux(), flux()
    inputs = flux_inputs()
    with ddit_rt.accelerated(pipe, schedule=schedule, coarse="naive"):
        before = latents_of(pipe, inputs)
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.5)
        after = latents_of(pipe, inputs)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.5)
    with ddit_rt.accelerated(other, schedule=schedule, coarse="naive"):
        assert torch.equal(after, latents_of(other, inputs))
    assert not torch.equal(before, after)
