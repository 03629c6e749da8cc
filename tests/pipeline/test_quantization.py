"""`quantize`: its recipes, what it refuses, and what accelerated pipelines do with quantised transformers."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from adapters import trained
from peft import LoraConfig
from quantised import ENDS, ENDS_MOST_OFF, LIBRARIES, MOST_OFF
from recorded import recorded
from tiny import flux, flux_inputs, latents_of, wan, wan_inputs
from torch import nn

import ddit_rt
from ddit_rt import ConfigError, UnsupportedPipelineError
from ddit_rt.families import family_of
from ddit_rt.pipeline import quantization
from ddit_rt.pipeline.quantization import RECIPES, obstacle, suited

SCHEDULE = (1, 1, 2, 4, 1, 0, 4, 2)
MODELS = {"flux": (flux, flux_inputs), "wan": (wan, wan_inputs)}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


def weights(pipe):
    return dict(pipe.transformer.named_parameters())


def coarse(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, **settings):
        return latents_of(pipe, inputs)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_quantised_transformers_run_plain_coarse_and_from_graphs(name, library):
    make, inputs = MODELS[name][0](), MODELS[name][1]()
    exact, exact_coarse = latents_of(make, inputs), coarse(make, inputs)
    LIBRARIES[library](make)
    plain = latents_of(make, inputs)
    assert not torch.equal(plain, exact) and (plain - exact).norm() < MOST_OFF[library] * exact.norm()
    with ddit_rt.accelerated(make, threshold=0):
        assert torch.equal(latents_of(make, inputs), plain)
    wanted = coarse(make, inputs)
    assert not torch.equal(wanted, plain)
    assert (wanted - exact_coarse).norm() < MOST_OFF[library] * exact_coarse.norm()
    recording = recorded(make, schedule=SCHEDULE)
    assert torch.equal(latents_of(make, inputs), wanted)
    assert torch.equal(latents_of(make, inputs), wanted)
    assert {step.executed for step in ddit_rt.report(make).steps} == {"graph", "cached"} and recording.replays
    ddit_rt.restore(make)
    assert torch.equal(latents_of(make, inputs), plain)


def test_graphs_notice_codes_that_moved(library):
    pipe, inputs = flux(), flux_inputs()
    other = flux()
    other.transformer.load_state_dict({k: v * 1.1 for k, v in pipe.transformer.state_dict().items()})
    for one in (pipe, other):
        library(one)
    recording = recorded(pipe, schedule=SCHEDULE)
    before, captures = latents_of(pipe, inputs), recording.captures
    for path, layer in other.transformer.named_modules():
        if hasattr(layer, "in_features") and ".attn.to_" in path:
            parent, _, name = path.rpartition(".")
            pipe.transformer.get_submodule(parent)._modules[name] = layer
    after = latents_of(pipe, inputs)
    assert recording.captures > captures and not torch.equal(after, before)
    ddit_rt.restore(pipe)
    assert torch.equal(coarse(pipe, inputs), after)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_stay_beside_quantised_layers(name, library):
    pipe, inputs = MODELS[name][0](), MODELS[name][1]()
    adapter = trained(pipe, targets=("feed-forward", "attention"))
    library(pipe)
    beside = coarse(pipe, inputs, adapter=adapter)
    assert torch.isfinite(beside).all()
    assert torch.equal(coarse(pipe, inputs, adapter=adapter, merge_adapter=True), beside)
    recording = recorded(pipe, adapter, schedule=SCHEDULE)
    assert torch.equal(latents_of(pipe, inputs), beside) and recording.replays


def test_a_users_lora_is_loaded_on_quantised_layers_and_taken_off(library):
    pipe, inputs = flux(), flux_inputs()
    library(pipe)
    without = coarse(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=SCHEDULE)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    after = latents_of(pipe, inputs)
    assert not torch.equal(after, without)
    ddit_rt.restore(pipe)
    assert torch.equal(coarse(pipe, inputs), after)
    pipe.transformer.delete_adapters("default")
    assert torch.equal(coarse(pipe, inputs), without)


def test_lora_layers_are_quantised_beneath_the_lora():
    pytest.importorskip("torchao")
    pipe, inputs = flux(), flux_inputs()
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    exact = latents_of(pipe, inputs)
    ddit_rt.quantize(pipe, "int8")
    found = latents_of(pipe, inputs)
    assert not torch.equal(found, exact) and (found - exact).norm() < MOST_OFF["torchao-int8"] * exact.norm()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert (
        "Int8" in type(layer.base_layer.weight).__name__ and type(layer.lora_A["default"].weight) is torch.nn.Parameter
    )


@pytest.mark.parametrize("library", ENDS)
def test_a_quantised_embedding_is_read_by_what_it_stands_for(library):
    pipe, inputs = flux(), flux_inputs()
    adapter, exact = trained(pipe), family_of(pipe).projections(pipe.transformer)
    ENDS[library](pipe)
    found = family_of(pipe).projections(pipe.transformer)
    for name in ("embed_weight", "deembed_weight"):
        ours, wanted = getattr(found, name), getattr(exact, name)
        assert ours.shape == wanted.shape and 0 < (ours - wanted).norm() < ENDS_MOST_OFF[library] * wanted.norm()
    plain = latents_of(pipe, inputs)
    for settings in ({"coarse": "naive"}, {"adapter": adapter}):
        assert torch.isfinite(coarse(pipe, inputs, **settings)).all()
    assert torch.equal(latents_of(pipe, inputs), plain)


@pytest.mark.parametrize("scheme", ["int8", "fp8-weights", "int8-weights"])
def test_only_the_blocks_attention_and_feed_forward_are_quantised(scheme):
    pytest.importorskip("torchao")
    pipe = flux()
    before = weights(pipe)
    assert ddit_rt.quantize(pipe, scheme) is pipe
    changed = {name for name, weight in weights(pipe).items() if weight is not before[name]}
    assert changed == {
        f"{name}.weight" for name in family_of(pipe).target_layers(pipe.transformer, ["feed-forward", "attention"])
    }
    assert not any("norm" in name or "embed" in name for name in changed)
    assert not any(weight.requires_grad for name, weight in weights(pipe).items() if name in changed)


def test_fused_projections_are_quantised_too():
    pytest.importorskip("torchao")
    pipe, inputs = flux(), flux_inputs()
    pipe.transformer.fuse_qkv_projections()
    ddit_rt.quantize(pipe, "int8")
    fused = pipe.transformer.transformer_blocks[0].attn.to_qkv
    assert "Int8" in type(fused.weight).__name__ and torch.isfinite(coarse(pipe, inputs)).all()


def offloaded(pipe):
    pipe.enable_sequential_cpu_offload(device="cpu")


def grouped(pipe):
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def cast(pipe):
    for name, layer in pipe.transformer.named_modules():
        if "attn.to_q" in name:
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "change, scheme, device, said",
    [
        (None, "fp16", None, "scheme='fp16': use 'auto' or one of 'fp8'"),
        (None, "auto", None, "pass device='cuda', or a scheme"),
        (None, "fp8", None, "cannot be had on cpu; pass device='cuda'"),
        (None, "int4", None, "cannot be had on cpu"),
        (None, "int8", "gpu", "device='gpu': torch knows no such device"),
        (ddit_rt.accelerate, "int8", None, "quantise before accelerate"),
        (offloaded, "int8", None, "is offloaded or hooked"),
        (grouped, "int8", None, "is offloaded or hooked"),
        (cast, "int8", None, "is stored as torch.float8_e4m3fn: load it in bfloat16"),
        (LIBRARIES["torchao-int8"], "int8", None, "is quantised already"),
        (LIBRARIES["gguf"], "int8", None, r"is quantised already \(GGUFLinear\)"),
        (LIBRARIES["bitsandbytes-4"], "int8", None, r"is quantised already \(Linear4bit\)"),
    ],
)
def test_what_cannot_be_quantised_is_named_and_left_as_it_is(change, scheme, device, said):
    pytest.importorskip("torchao")
    pipe = flux()
    if change is not None:
        change(pipe)
    before = weights(pipe)
    with pytest.raises(ConfigError, match=said):
        ddit_rt.quantize(pipe, scheme, device)
    assert all(weight is before[name] for name, weight in weights(pipe).items())


def test_without_torchao_nothing_is_quantised(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        ddit_rt.quantize(flux(), "int8")


def test_a_recipe_that_fails_on_one_layer_changes_none(monkeypatch):
    pytest.importorskip("torchao")
    pipe = flux()
    before = weights(pipe)

    def fails(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(quantization, "_quantised", fails)
    with pytest.raises(ConfigError, match=r"does not run on cpu: no such kernel\. Take another"):
        ddit_rt.quantize(pipe, "int8")
    assert all(weight is before[name] for name, weight in weights(pipe).items())


def test_bfloat16_and_fitting_sizes_are_asked_for(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantization, "obstacle", lambda recipe, device: "")
    with pytest.raises(ConfigError, match=r"has to be bfloat16\. Load the pipeline with torch_dtype"):
        ddit_rt.quantize(flux(), "fp8")
    with pytest.raises(ConfigError, match="no layer has sizes that are multiples of 128"):
        small = flux(dtype=torch.bfloat16)
        small.transformer.transformer_blocks = torch.nn.ModuleList()
        small.transformer.single_transformer_blocks[0].proj_out = torch.nn.Linear(72, 32, dtype=torch.bfloat16)
        ddit_rt.quantize(small, "int4")


def card(monkeypatch, capability, memory):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))


@pytest.mark.parametrize(
    "capability, gigabytes, scheme",
    [((9, 0), 141, "fp8"), ((8, 9), 24, "fp8"), ((8, 0), 80, "int8"), ((8, 6), 24, "int8"), ((8, 9), 12, "int4")],
)
def test_auto_goes_by_the_card(monkeypatch, capability, gigabytes, scheme):
    pytest.importorskip("torchao")
    card(monkeypatch, capability, gigabytes * 1e9)
    with torch.device("meta"):
        block = torch.nn.Linear(2**16, 67_000, dtype=torch.bfloat16)  # 8.8 GB, 4.4 in 8 bits
        rest = torch.nn.Linear(2**16, 50_000, dtype=torch.bfloat16)  # 6.6 GB
    model = torch.nn.ModuleDict({"block": block, "rest": rest})
    found = suited({"transformer": model}, {"transformer": {"block": block}}, torch.device("cuda"))
    assert found == scheme


@pytest.mark.parametrize("scheme", RECIPES)
def test_recipes_say_which_cards_have_them(monkeypatch, scheme):
    pytest.importorskip("torchao")
    cuda = torch.device("cuda")
    card(monkeypatch, (9, 0), 0)
    assert obstacle(RECIPES[scheme], cuda) == ""
    card(monkeypatch, (8, 0), 0)
    assert ("8.9, this card has 8.0" in obstacle(RECIPES[scheme], cuda)) == (scheme == "fp8")
    card(monkeypatch, (7, 5), 0)
    assert "this card has 7.5" in obstacle(RECIPES[scheme], cuda)
    assert RECIPES[scheme].make() is not None


class Packed(nn.Module):
    """A layer of a library that is not known: its values are codes, under a name of its own or as its weight."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.bias, self.run = layer.bias, layer.forward
        vars(self).update({name: value for name, value in vars(layer).items() if name.endswith("_features")})
        self.register_buffer(name, layer.weight.detach().mul(127).to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("name, said", [("qweight", "has no weight"), ("weight", "keeps its weight as torch.int8")])
@pytest.mark.parametrize("make, inputs", [(flux, flux_inputs), (wan, wan_inputs)])
def test_ends_whose_values_are_out_of_reach_are_refused_where_they_are_read(make, inputs, name, said, end):
    pipe, call = make(), inputs(steps=3)
    wanted = latents_of(pipe, call)
    adapter = trained(pipe)
    at = family_of(pipe).projection_names[end]
    own = pipe.transformer.get_submodule(at)
    pipe.transformer._modules[at] = Packed(own, name)
    assert torch.equal(latents_of(pipe, call), wanted)
    for settings in ({"coarse": "naive"}, {"adapter": adapter}):
        with pytest.raises(UnsupportedPipelineError, match=rf"{said}.*coarse='delta'"):
            ddit_rt.accelerate(pipe, schedule=[1, 2, 1], **settings)
        assert torch.equal(latents_of(pipe, call), wanted)
    # band-split runs the ends as they are
    ddit_rt.accelerate(pipe, schedule=[1, 2, 1], coarse="band-split")
    made = latents_of(pipe, call)
    pipe.transformer._modules[at] = own
    assert torch.equal(latents_of(pipe, call), made)
