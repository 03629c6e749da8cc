"""Coarse steps of models whose weights are offloaded, cast to 8 bits, fused with a LoRA, or changed without a trace."""

import pytest
import torch
from adapters import fresh, trained
from peft import LoHaConfig, LoraConfig
from tiny import flux, flux_inputs, latents_of, wan, wan_inputs

import ddit_rt
from ddit_rt import AdapterMismatchError, UnsupportedPipelineError
from ddit_rt.families import family_of
from ddit_rt.families.weights import own_weight, stored

SCHEDULE = [1, 1, 2, 4, 1, 2, 4, 1]
MODELS = {"flux": (flux, flux_inputs), "wan": (wan, wan_inputs)}


def coarse(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, **settings):
        return latents_of(pipe, inputs)


def embedding_of(pipe):
    return getattr(pipe.transformer, "x_embedder", None) or pipe.transformer.patch_embedding


@pytest.mark.parametrize("name", MODELS)
def test_naive_sees_weights_that_changed_between_calls_without_a_trace(name):
    make, inputs = MODELS[name][0], MODELS[name][1]()
    pipe = make()
    ddit_rt.accelerate(pipe, schedule=SCHEDULE, coarse="naive")
    before = latents_of(pipe, inputs)
    embedding_of(pipe).weight.data.mul_(1.5)
    changed = latents_of(pipe, inputs)
    assert not torch.equal(changed, before)
    ddit_rt.restore(pipe)
    assert torch.equal(coarse(pipe, inputs, coarse="naive"), changed)


def test_naive_takes_weights_that_count_no_versions():
    inputs = flux_inputs()
    wanted = coarse(flux(), inputs, coarse="naive")
    with torch.inference_mode():
        pipe = flux()
        for layer in pipe.transformer.modules():
            for weight in layer._parameters:
                if layer._parameters[weight] is not None:
                    layer._parameters[weight] = torch.nn.Parameter(layer._parameters[weight].clone(), False)
    assert embedding_of(pipe).weight.is_inference()
    assert torch.equal(coarse(pipe, inputs, coarse="naive"), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_read_under_sequential_offload(name):
    """Only what accelerate() reads: run on a CPU, such a pipeline fails in accelerate's own hooks, plain as well."""
    make = MODELS[name][0]
    adapter, pipe = trained(make()), make()
    family = family_of(pipe)
    wanted = family.patch_embedding(pipe.transformer, 2)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert embedding_of(pipe).weight.is_meta
    found = family.patch_embedding(pipe.transformer, 2)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters()))
    assert embedding_of(pipe).weight.is_meta
    pipe = make()
    pipe.enable_sequential_cpu_offload(device="cpu")
    ddit_rt.accelerate(pipe, adapter=adapter)
    assert embedding_of(pipe).weight.is_meta


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_knows_its_model_in_8_bits(name):
    make, inputs = MODELS[name][0], MODELS[name][1]()
    adapter, pipe = trained(make()), make()
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=["norm"]
    )
    for settings in ({"adapter": adapter}, {"coarse": "naive"}):
        assert torch.isfinite(coarse(pipe, inputs, **settings)).all()


def with_lora_at_the_embedding(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["x_embedder"], init_lora_weights=False))
    return pipe


def test_an_adapter_knows_its_model_under_a_fused_lora():
    adapter, inputs = trained(flux()), flux_inputs()
    pipe = with_lora_at_the_embedding(flux())
    apart = coarse(pipe, inputs, adapter=adapter)
    with torch.no_grad():
        for weight in embedding_of(pipe).lora_B["default"].parameters():
            weight.mul_(20)  # far from the model that it was
    pipe.transformer.fuse_lora()
    fused = coarse(pipe, inputs, adapter=adapter)
    assert torch.isfinite(fused).all() and not torch.equal(apart, fused)


def add_loras(pipe, *names, **options):
    torch.manual_seed(0)
    ends = "|".join(family_of(pipe).projection_names)  # an expression: in a list, names would match inside blocks too
    for name in names:
        config = LoraConfig(r=2, target_modules=ends, init_lora_weights=False, **options)
        pipe.transformer.add_adapter(config, adapter_name=name)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["plain", "bias", "dora"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_ends_are_read_as_they_compute_with_loras(name, options):
    pipe = MODELS[name][0]()
    add_loras(pipe, "one", "two", **options)
    pipe.transformer.set_adapters(["one", "two"], [0.5, 2.0])
    for end in map(pipe.transformer.get_submodule, family_of(pipe).projection_names):
        weight, bias = stored(end), stored(end, "bias")
        assert torch.equal(own_weight(end), end.base_layer.weight)
        inputs = torch.randn(3, *weight.shape[1:])
        found = torch.einsum("bi,oi->bo", inputs.flatten(1), weight.flatten(1)) + bias
        torch.testing.assert_close(found, end(inputs).flatten(1), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_kind_on_an_end_is_refused_by_naive():
    pipe = flux()
    pipe.transformer.add_adapter(LoHaConfig(r=2, target_modules=["x_embedder"], init_weights=False), "other")
    with pytest.raises(UnsupportedPipelineError, match="'other' beside it, which is no plain LoRA"):
        ddit_rt.accelerate(pipe, coarse="naive")


@pytest.mark.parametrize("name", MODELS)
def test_naive_follows_loras_on_the_ends(name):
    make, inputs = MODELS[name][0], MODELS[name][1]()
    pipe = make()
    model = pipe.transformer
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, coarse="naive", corrector=False):
        without = latents_of(pipe, inputs)
        add_loras(pipe, "mine")
        beside = latents_of(pipe, inputs)
        model.set_adapters(["mine"], [0.25])
        weak = latents_of(pipe, inputs)
        model.disable_adapters()
        assert torch.equal(latents_of(pipe, inputs), without)
        model.enable_adapters()
        model.set_adapters(["mine"], [1.0])
        with_scale = {**inputs, "joint_attention_kwargs" if name == "flux" else "attention_kwargs": {"scale": 0.25}}
        assert torch.equal(latents_of(pipe, with_scale), weak)
        assert torch.equal(latents_of(pipe, inputs), beside)
        model.fuse_lora()
        torch.testing.assert_close(latents_of(pipe, inputs), beside, rtol=1e-3, atol=1e-3)
        model.unfuse_lora()
        model.delete_adapters("mine")
        torch.testing.assert_close(latents_of(pipe, inputs), without, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(beside, without, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(beside, weak, rtol=1e-2, atol=1e-2)


def test_naive_coarse_steps_have_the_lora_that_full_ones_have():
    """A schedule without full steps: nothing else shows it."""
    pipe, inputs = flux(), flux_inputs(steps=2)
    found = []
    for with_lora in (False, True):
        if with_lora:
            add_loras(pipe, "mine")
        with ddit_rt.accelerated(pipe, schedule=[2, 2], coarse="naive", corrector=False):
            found.append(latents_of(pipe, inputs))
    assert not torch.allclose(*found, rtol=1e-2, atol=1e-2)


def test_an_adapter_says_that_a_lora_on_the_ends_is_not_in_coarse_steps(caplog):
    adapter, pipe, inputs = trained(flux()), with_lora_at_the_embedding(flux()), flux_inputs()
    with ddit_rt.accelerated(pipe, adapter=adapter, schedule=SCHEDULE):
        latents_of(pipe, inputs)
        latents_of(pipe, inputs)
        notes = [step.note for step in ddit_rt.report(pipe).steps]
        said = "the LoRA on x_embedder changes full steps alone: in coarse ones the adapter's weights stand there"
        assert notes == [said if multiple > 1 else "" for multiple in SCHEDULE]
        assert [record.getMessage() for record in caplog.records].count(said) == 1
        pipe.transformer.disable_adapters()
        latents_of(pipe, inputs)
        assert not any(step.note for step in ddit_rt.report(pipe).steps)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fresh_adapter_has_the_models_loras_and_fits_without_them(fused):
    pipe, inputs = flux(), flux_inputs()
    add_loras(pipe, "mine")
    if fused:
        pipe.transformer.fuse_lora()
    adapter = fresh(pipe)
    wanted = coarse(pipe, inputs, coarse="band-split")
    torch.testing.assert_close(coarse(pipe, inputs, adapter=adapter), wanted, rtol=1e-3, atol=1e-3)
    ddit_rt.accelerate(flux(), adapter=adapter)


def test_a_lora_that_was_fused_for_good_is_named_among_the_ways_out():
    adapter, pipe = trained(flux()), flux()
    with torch.no_grad():
        embedding_of(pipe).weight.mul_(2)
    with pytest.raises(AdapterMismatchError, match="unfuse a LoRA"):
        ddit_rt.accelerate(pipe, adapter=adapter)


@pytest.mark.parametrize("settings", [{"coarse": "naive"}, {"merge_adapter": True}])
def test_copies_of_weights_that_were_made_in_inference_mode_are_renewed_outside_it(settings):
    pipe, inputs = flux(), flux_inputs()
    adapter = trained(pipe) if "merge_adapter" in settings else None
    ddit_rt.accelerate(pipe, adapter, schedule=SCHEDULE, **settings)
    with torch.inference_mode():
        latents_of(pipe, inputs)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
    changed = latents_of(pipe, inputs)
    ddit_rt.restore(pipe)
    with ddit_rt.accelerated(pipe, adapter, schedule=SCHEDULE, **settings):
        assert torch.equal(latents_of(pipe, inputs), changed)


def test_naive_reads_weights_in_the_dtype_that_a_call_has():
    pipe = flux()
    ddit_rt.accelerate(pipe, schedule=SCHEDULE, coarse="naive")
    pipe.to(torch.bfloat16)
    latents_of(pipe, flux_inputs(dtype=torch.bfloat16))
    pipe.to(torch.float32)
    first = latents_of(pipe, flux_inputs())
    assert torch.equal(latents_of(pipe, flux_inputs()), first)
