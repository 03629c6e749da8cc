"""The public calls, what they work together with, and every error they raise."""

import copy
import io
import math
import pickle

import pytest
import torch
from cases import ALL
from diffusers import (
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from tiny import flux, flux_inputs, flux_transformer, latents_of, negative, picture, wan, wan_inputs

import ddit_rt
from ddit_rt import AdapterMismatchError, ConfigError, DDiTError, ScheduleError, UnsupportedPipelineError

COARSE = (1, 1, 2, 4, 1, 4, 2, 2)


def coarse_result(pipe, inputs, **settings):
    """Latents and multiples of one accelerated call, the pipeline restored."""
    with ddit_rt.accelerated(pipe, **{"schedule": COARSE, **settings}):
        return latents_of(pipe, inputs), ddit_rt.report(pipe).schedule


# -- putting on and taking off --------------------------------------------------------------------------------------


def test_accelerate_returns_the_pipeline_and_restore_undoes_it():
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    assert ddit_rt.accelerate(pipe, schedule=COARSE) is pipe
    assert not torch.equal(latents_of(pipe, inputs), plain)
    assert ddit_rt.restore(pipe) is pipe
    assert torch.equal(latents_of(pipe, inputs), plain)
    assert ddit_rt.restore(pipe) is pipe


def test_accelerate_again_takes_the_new_settings_and_one_restore_undoes_both():
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=COARSE)
    ddit_rt.accelerate(pipe, threshold=0)
    assert torch.equal(latents_of(pipe, inputs), plain)
    assert ddit_rt.report(pipe).config["threshold"] == 0
    ddit_rt.restore(pipe)
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__


def test_settings_come_as_config_mapping_or_names():
    pipe = flux()
    for given in (
        {"config": ddit_rt.DDiTConfig(order=2)},
        {"config": {"order": 2}},
        {"config": {"order": 1}, "order": 2},
        {"order": 2},
    ):
        with ddit_rt.accelerated(pipe, **given):
            latents_of(pipe, flux_inputs(steps=2))
            assert ddit_rt.report(pipe).config["order"] == 2


def test_the_context_restores_also_after_an_exception():
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    with pytest.raises(ZeroDivisionError), ddit_rt.accelerated(pipe, schedule=COARSE):
        latents_of(pipe, inputs)
        raise ZeroDivisionError
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_report_needs_an_accelerated_pipeline_that_was_called():
    pipe = flux()
    with pytest.raises(DDiTError, match="FluxPipeline is not accelerated"):
        ddit_rt.report(pipe)
    with pytest.raises(DDiTError, match="SimpleClass is not accelerated"):
        ddit_rt.report(type("SimpleClass", (), {})())
    with ddit_rt.accelerated(pipe), pytest.raises(DDiTError, match="call the accelerated pipeline first"):
        ddit_rt.report(pipe)


# -- CPU offload ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("make", [lambda: (flux(), flux_inputs()), lambda: (wan(two=True), wan_inputs())])
def test_model_cpu_offload_before_and_after(make, first):
    pipe, inputs = make()
    plain, (coarse, multiples) = latents_of(pipe, inputs), coarse_result(pipe, inputs)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    ddit_rt.accelerate(pipe, schedule=COARSE)
    if first == "accelerate":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):  # the pipeline takes all hooks away and puts them on again after every call
        assert torch.equal(latents_of(pipe, inputs), coarse)
        assert ddit_rt.report(pipe).complete and ddit_rt.report(pipe).schedule == multiples
        assert hasattr(pipe.transformer, "_hf_hook")
    ddit_rt.restore(pipe)
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert torch.equal(latents_of(pipe, inputs), plain)
    pipe.remove_all_hooks()
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_a_scheduler_exchanged_under_cpu_offload_is_followed():
    pipe, inputs = wan(), wan_inputs()
    pipe.enable_model_cpu_offload(device="cpu")
    ddit_rt.accelerate(pipe, schedule=COARSE)
    latents_of(pipe, inputs)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    result = latents_of(pipe, inputs)
    assert ddit_rt.report(pipe).complete and ddit_rt.report(pipe).schedule == list(COARSE)
    assert torch.equal(result, coarse_result(wan(euler=True), inputs)[0])


# -- schedulers -----------------------------------------------------------------------------------------------------


def test_a_scheduler_exchanged_after_accelerate_is_followed_and_the_old_one_is_clean():
    pipe, inputs = flux(), flux_inputs()
    old = pipe.scheduler
    ddit_rt.accelerate(pipe, schedule=COARSE)
    latents_of(pipe, inputs)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    result = latents_of(pipe, inputs)
    assert ddit_rt.report(pipe).complete and ddit_rt.report(pipe).schedule == list(COARSE)
    assert not {"step", "set_timesteps", "_ddit_pipeline"} & set(old.__dict__)
    latents_of(pipe, inputs)
    assert torch.equal(latents_of(pipe, inputs), result)
    ddit_rt.restore(pipe)
    assert not {"step", "set_timesteps", "_ddit_pipeline"} & set(pipe.scheduler.__dict__)


NO_FLOW = {
    "euler": lambda: EulerDiscreteScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(),
    "no-flow-sigmas": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction"),
    "inverted": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}


@pytest.mark.parametrize("name", NO_FLOW)
def test_a_scheduler_without_flow_is_refused_with_the_way_out(name):
    pipe = wan()
    own, plain = pipe.scheduler, latents_of(pipe, wan_inputs())
    pipe.scheduler = NO_FLOW[name]()
    with pytest.raises(UnsupportedPipelineError, match=rf"{type(pipe.scheduler).__name__}.*use_flow_sigmas=True"):
        ddit_rt.accelerate(pipe)
    pipe.scheduler = own
    ddit_rt.accelerate(pipe, threshold=0)
    pipe.scheduler = NO_FLOW[name]()
    with pytest.raises(UnsupportedPipelineError, match="use_flow_sigmas=True"):
        latents_of(pipe, wan_inputs())
    pipe.scheduler = own
    assert torch.equal(latents_of(pipe, wan_inputs()), plain)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), wan_inputs()), plain)


# -- sharing --------------------------------------------------------------------------------------------------------


def test_a_pipeline_made_from_an_accelerated_one_is_reported_restored_and_takes_over():
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    given = flux_inputs(image=picture(), strength=0.5)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    other_plain = latents_of(other, given)
    ddit_rt.accelerate(pipe, threshold=0)
    assert torch.equal(latents_of(other, given), other_plain)
    assert ddit_rt.report(other).complete and len(ddit_rt.report(other).steps) == 4
    ddit_rt.accelerate(other, schedule=[1, 2, 4, 2])
    coarse = latents_of(other, given)
    assert ddit_rt.report(other).schedule == [1, 2, 4, 2] and not torch.equal(coarse, other_plain)
    ddit_rt.restore(pipe)
    assert torch.equal(latents_of(other, given), other_plain) and torch.equal(latents_of(pipe, inputs), plain)
    with pytest.raises(DDiTError, match="not accelerated"):
        ddit_rt.report(other)
    ddit_rt.accelerate(pipe, threshold=0)
    ddit_rt.restore(other)
    assert not {"forward", "_ddit_pipeline"} & set(pipe.transformer.__dict__)
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_a_pipeline_with_a_scheduler_of_its_own_takes_the_transformer_over_and_says_so(caplog):
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    own = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, "scheduler": own})
    other.set_progress_bar_config(disable=True)
    ddit_rt.accelerate(pipe, schedule=COARSE)
    assert torch.equal(latents_of(other, inputs), plain)  # another pipeline's calls are not ours
    with caplog.at_level("WARNING"):
        ddit_rt.accelerate(other, schedule=COARSE)
    assert "takes its transformer over" in caplog.text
    assert not torch.equal(latents_of(other, inputs), plain)
    assert torch.equal(latents_of(pipe, inputs), plain)
    ddit_rt.restore(other)
    assert torch.equal(latents_of(other, inputs), plain)


def test_two_pipelines_with_one_scheduler_are_refused():
    first, second = wan(), wan()
    second.scheduler = first.scheduler
    with ddit_rt.accelerated(first), pytest.raises(UnsupportedPipelineError, match=r"UniPC.* is shared"):
        ddit_rt.accelerate(second)
    assert "forward" not in second.transformer.__dict__


def test_a_scheduler_of_another_accelerated_pipeline_cannot_be_moved_in():
    first, second = wan(), wan()
    own = second.scheduler
    with ddit_rt.accelerated(first, schedule=COARSE), ddit_rt.accelerated(second, schedule=COARSE):
        result = latents_of(first, wan_inputs())
        second.scheduler = first.scheduler
        with pytest.raises(UnsupportedPipelineError, match=r"UniPC.* is shared"):
            latents_of(second, wan_inputs())
        second.scheduler = own
        assert torch.equal(latents_of(first, wan_inputs()), result)
        assert torch.equal(latents_of(second, wan_inputs()), result)


def test_a_transformer_exchanged_after_accelerate_is_noticed():
    pipe, inputs = flux(), flux_inputs()
    ddit_rt.accelerate(pipe, schedule=COARSE)
    latents_of(pipe, inputs)
    pipe.transformer = flux_transformer(seed=5)
    with pytest.raises(UnsupportedPipelineError, match=r"transformer was exchanged.*accelerate\(pipe\) again"):
        latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=COARSE)
    latents_of(pipe, inputs)
    assert ddit_rt.report(pipe).complete


# -- compiled transformers ------------------------------------------------------------------------------------------


def test_a_transformer_compiled_in_place_is_refused():
    pipe = flux()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(UnsupportedPipelineError, match=r"transformer.compile\(\) hides its forward"):
        ddit_rt.accelerate(pipe)
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__


def test_a_compiled_transformer_works():
    pipe, inputs = flux(), flux_inputs(steps=2)
    plain = latents_of(pipe, inputs)
    coarse, _ = coarse_result(pipe, inputs, schedule=[1, 2])
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", dynamic=True)
    try:
        with ddit_rt.accelerated(pipe, schedule=[1, 2]):
            torch.testing.assert_close(latents_of(pipe, inputs), coarse, rtol=1e-4, atol=1e-4)
            assert ddit_rt.report(pipe).complete
        torch.testing.assert_close(latents_of(pipe, inputs), plain, rtol=1e-4, atol=1e-4)
    finally:
        torch.compiler.reset()


# -- LoRA -----------------------------------------------------------------------------------------------------------


def add_lora(pipe):
    torch.manual_seed(0)
    targets = ["to_q", "proj_mlp", "x_embedder"] if hasattr(pipe.transformer, "x_embedder") else ["to_q", "proj_out"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="mine")


@pytest.mark.parametrize("coarse", ["delta", "naive"])
@pytest.mark.parametrize("make", [lambda: (flux(), flux_inputs()), lambda: (wan(), wan_inputs())])
def test_lora_loaded_before_and_after(make, coarse):
    pipe, inputs = make()
    without, _ = coarse_result(pipe, inputs, coarse=coarse)
    ddit_rt.accelerate(pipe, schedule=COARSE, coarse=coarse)
    add_lora(pipe)
    after = latents_of(pipe, inputs)
    assert not torch.equal(after, without)
    ddit_rt.restore(pipe)
    before, _ = coarse_result(pipe, inputs, coarse=coarse)
    assert torch.equal(before, after)
    ddit_rt.accelerate(pipe, schedule=COARSE, coarse=coarse)
    pipe.transformer.delete_adapters("mine")
    assert torch.equal(latents_of(pipe, inputs), without)


def test_with_lora_the_plain_output_stays_bit_for_bit():
    pipe, inputs = flux(), negative(flux_inputs())
    add_lora(pipe)
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(latents_of(pipe, inputs), plain)
        pipe.transformer.disable_adapters()
        switched = latents_of(pipe, inputs)
    assert not torch.equal(switched, plain)
    assert torch.equal(latents_of(pipe, inputs), switched)


def test_the_scale_of_a_lora_reaches_coarse_steps():
    results = []
    for scale in (1.0, 0.5):
        pipe = flux()
        add_lora(pipe)
        given = flux_inputs(joint_attention_kwargs={"scale": scale})
        plain = latents_of(pipe, given)
        with ddit_rt.accelerated(pipe, threshold=0):
            assert torch.equal(latents_of(pipe, given), plain)
        results.append(coarse_result(pipe, given, schedule=[2] * 8)[0])
    assert not torch.allclose(*results)


# -- step caches of diffusers ---------------------------------------------------------------------------------------


def cache_contexts(module):
    """Names of the contexts that the first block's cache keeps a state for."""
    hooks = next(m for m in module.modules() if hasattr(m, "_diffusers_hook") and m._diffusers_hook.hooks)
    (hook,) = hooks._diffusers_hook.hooks.values()
    return set(hook.state_manager._state_cache)


@pytest.mark.parametrize("name", ["flux-true-cfg", "flux-inpaint", "wan", "wan-two"])
def test_first_block_cache_keeps_a_state_per_call_and_multiple(name):
    pipe, inputs = ALL[name]()
    plain = latents_of(pipe, inputs)
    contexts = set()

    def watch(pipe, index, timestep, tensors):
        contexts.update(cache_contexts(pipe.transformer))
        return {}

    schedule = (1, 1, 2, 4, 1, 1, 2)
    cache = FirstBlockCacheConfig(threshold=1e9)  # reuses wherever it can: a mix-up of token counts would crash
    with ddit_rt.accelerated(pipe, schedule=lambda index, patch_std: schedule[index % 7], cache=cache):
        for _ in range(2):
            assert torch.isfinite(latents_of(pipe, {**inputs, "callback_on_step_end": watch})).all()
            assert ddit_rt.report(pipe).complete
    for multiple in (1, 2, 4):
        calls = {name.split("@")[0] for name in contexts if f"@{multiple}" in name}
        assert len(calls) == 2, contexts  # guidance makes two calls per step
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_a_cache_that_the_user_enabled_stays_the_users():
    pipe, inputs = flux(), flux_inputs()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(latents_of(pipe, inputs), plain)
    with ddit_rt.accelerated(pipe, schedule=COARSE):
        assert torch.isfinite(latents_of(pipe, inputs)).all()
    with pytest.raises(ConfigError, match=r"cache=.*has a cache already.*disable_cache"):
        ddit_rt.accelerate(pipe, cache=FirstBlockCacheConfig())
    assert pipe.transformer.is_cache_enabled
    assert torch.equal(latents_of(pipe, inputs), plain)


# -- errors ---------------------------------------------------------------------------------------------------------

BAD = {
    "threshold": ({"threshold": -1}, ConfigError, "threshold=-1"),
    "quantile": ({"quantile": 1.5}, ConfigError, "quantile=1.5"),
    "order": ({"order": 4}, ConfigError, "order=4"),
    "multiples": ({"multiples": (1, 3)}, ConfigError, r"multiples=\(1, 3\)"),
    "unknown": ({"tau": 1}, ConfigError, "unknown setting 'tau'"),
    "entry": ({"schedule": [1, 3]}, ScheduleError, r"schedule\[1\]=3"),
    "schedule": ({"schedule": 7}, ScheduleError, "schedule=7"),
    "no-adapter": ({"coarse": "adapter"}, ConfigError, "coarse='adapter' needs adapter"),
    "adapter": ({"adapter": "/nowhere/at/all.safetensors"}, AdapterMismatchError, "/nowhere/at/all.safetensors"),
    "cache": ({"cache": "fbc"}, ConfigError, "cache='fbc'"),
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_and_the_pipeline_stays_as_it_was(name, accelerated):
    settings, error, message = BAD[name]
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    if accelerated:
        ddit_rt.accelerate(pipe, threshold=0)
    with pytest.raises(error, match=message):
        ddit_rt.accelerate(pipe, **settings)
    assert torch.equal(latents_of(pipe, inputs), plain)
    if accelerated:
        assert ddit_rt.report(pipe).config["threshold"] == 0
        ddit_rt.restore(pipe)
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__


@pytest.mark.parametrize("pipe", [object(), None, type("StableDiffusionPipeline", (), {})()])
def test_another_pipeline_is_refused(pipe):
    with pytest.raises(UnsupportedPipelineError, match=r"is not supported.*FluxPipeline"):
        ddit_rt.accelerate(pipe)


def refused_before_the_first_step(pipe, inputs, error, message):
    """The accelerated call fails before any step, and the pipeline is none the worse for it."""
    steps = []

    def watch(pipe, index, timestep, tensors):
        steps.append(index)
        return {}

    with pytest.raises(error, match=message):
        latents_of(pipe, {**inputs, "callback_on_step_end": watch})
    assert not steps


@pytest.mark.parametrize("make", [lambda: (flux(), flux_inputs()), lambda: (wan(), wan_inputs())])
def test_a_schedule_of_the_wrong_length_is_refused_before_the_first_step(make):
    pipe, inputs = make()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=[1, 1, 2])
    refused_before_the_first_step(pipe, inputs, ScheduleError, "3 entries, this run has 8")
    latents_of(pipe, {**inputs, "num_inference_steps": 3})
    assert ddit_rt.report(pipe).schedule == [1, 1, 2]
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs), plain)


@pytest.mark.parametrize("schedule", [[2, 1, 1, 1, 1, 1, 1, 1], lambda index, patch_std: 2], ids=["fixed", "callable"])
def test_a_path_without_a_model_call_cannot_come_first(schedule):
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=schedule, coarse="reuse")
    refused_before_the_first_step(pipe, inputs, ScheduleError, r"schedule\[0\]=2.*full first step")
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs), plain)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_latents_that_are_not_finite_are_refused_before_the_first_step(name, value):
    pipe, inputs = ALL[name]()
    plain = latents_of(pipe, inputs)
    latents = torch.randn(plain.shape)
    latents.view(-1)[5] = value
    ddit_rt.accelerate(pipe, threshold=0)
    refused_before_the_first_step(pipe, {**inputs, "latents": latents}, ConfigError, "NaN or Inf")
    assert torch.equal(latents_of(pipe, inputs), plain)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs), plain)


def test_a_latent_that_loses_its_finiteness_runs_fine_and_is_noted():
    def spoil(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] * (math.nan if index == 3 else 1)}

    pipe = flux()
    with ddit_rt.accelerated(pipe, threshold=1e9, order=1, max_consecutive_coarse=None):
        latents_of(pipe, flux_inputs(callback_on_step_end=spoil))
        report = ddit_rt.report(pipe)
    assert report.schedule == [1, 4, 4, 4, 4, 1, 1, 1]
    assert all("not finite" in s.note for s in report.steps[5:]) and report.to_json()


def test_a_callable_that_returns_nonsense_is_named_and_the_next_call_works():
    pipe, inputs = flux(), flux_inputs()
    answers = {3: 5}
    ddit_rt.accelerate(pipe, schedule=lambda index, patch_std: answers.get(index, 1))
    with pytest.raises(ScheduleError, match="returned 5 for step 3"):
        latents_of(pipe, inputs)
    answers.clear()
    result = latents_of(pipe, inputs)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs), result)


def test_an_exception_of_a_callable_passes_through():
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=lambda index, patch_std: 1 // (2 - index))
    with pytest.raises(ZeroDivisionError):
        latents_of(pipe, inputs)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs), plain)


def test_copies_of_an_accelerated_pipelines_components_are_plain() -> None:
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=COARSE)
    coarse = latents_of(pipe, inputs)
    for copied in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        scheduler = copied(pipe.scheduler)
        assert not {"step", "set_timesteps", "_ddit_pipeline", "__getstate__"} & set(scheduler.__dict__)
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.5)
        assert len(pipe.scheduler.timesteps) != 2
        transformer = copied(pipe.transformer)
        assert not {"forward", "_ddit_pipeline", "__getstate__"} & set(transformer.__dict__)
        other = type(pipe)(**{**pipe.components, "scheduler": scheduler, "transformer": transformer})
        other.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(other, inputs), plain)
        assert torch.equal(latents_of(pipe, inputs), coarse)
    buffer = io.BytesIO()
    torch.save(pipe, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(latents_of(loaded, inputs), plain)
    ddit_rt.restore(pipe)
    assert not any("__getstate__" in one.__dict__ for one in (pipe, pipe.transformer, pipe.scheduler))
