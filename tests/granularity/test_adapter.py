"""Adapters: fresh ones equal band-split, trained ones act on coarse steps and on nothing else."""

import copy
import re
from dataclasses import replace

import pytest
import tiny
import torch
from adapters import fresh, trained
from peft import LoraConfig

import ddit_rt
from ddit_rt import AdapterMismatchError, ConfigError, DDiTConfig
from ddit_rt.granularity.adapter.lora import LowRank

SCHEDULE = [1, 1, 1, 2, 4, 1, 2, 4]


def run(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, **{"schedule": SCHEDULE, **settings}):
        return tiny.latents_of(pipe, inputs)


CASES = {
    "flux": lambda: (tiny.flux(), tiny.flux_inputs()),
    "flux-batch-odd": lambda: (tiny.flux(), tiny.negative(tiny.flux_inputs(batch=2, height=72, width=40))),
    "wan": lambda: (tiny.wan(), tiny.wan_inputs()),
    "wan-odd": lambda: (tiny.wan(), tiny.wan_inputs(height=48, width=80)),
    "wan-image": lambda: (tiny.wan_image(), tiny.wan_inputs(image=tiny.picture(64, 96))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("coarse", "base"), [("adapter", "band-split"), ("adapter-delta", "delta")])
def test_fresh_adapter_is_band_split(name, coarse, base):
    pipe, inputs = CASES[name]()
    for options in ({}, {"memory": False, "shared": True}):
        residual = "linear" if options else "constant"  # with memory the adapter sees the line itself
        expected = run(pipe, inputs, coarse=base, residual=residual, high_band="clean")
        found = run(pipe, inputs, coarse=coarse, adapter=fresh(pipe, **options))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["native", "interpolated"])
def test_positions_are_those_it_was_trained_with(positions):
    pipe, inputs = CASES["flux"]()
    expected = run(pipe, inputs, coarse="band-split", positions=positions)
    found = run(pipe, inputs, adapter=fresh(pipe, positions=positions))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_fine_steps_are_the_plain_pipelines(name):
    pipe, inputs = CASES[name]()
    plain = tiny.latents_of(pipe, inputs)
    keys = list(pipe.transformer.state_dict())
    adapter = trained(pipe)
    assert torch.equal(run(pipe, inputs, adapter=adapter, schedule=None, threshold=0.0), plain)
    assert torch.equal(run(pipe, inputs, adapter=adapter, schedule=[1] * 8), plain)
    assert not torch.equal(run(pipe, inputs, adapter=adapter), plain)
    assert torch.equal(tiny.latents_of(pipe, inputs), plain)
    assert list(pipe.transformer.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())


def test_every_learned_part_matters():
    pipe, inputs = CASES["flux"]()
    before = run(pipe, inputs, adapter=fresh(pipe))
    for name, _ in fresh(pipe).named_parameters():
        adapter = fresh(pipe)
        parameters = dict(adapter.named_parameters())
        with torch.no_grad():
            parameters[name].add_(0.1)
            if "lora_A" in name:  # B is zero at the start
                parameters[name.replace("lora_A", "lora_B")].add_(0.1)
            if ".enter." in name:
                parameters[name.rsplit(".enter.", 1)[0] + ".leave.weight"].add_(0.1)
        assert not torch.allclose(run(pipe, inputs, adapter=adapter), before), name


def test_delta_and_memory_change_the_prediction():
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    direct = run(pipe, inputs, adapter=adapter, coarse="adapter")
    assert torch.equal(run(pipe, inputs, adapter=adapter), direct)  # what "auto" takes
    assert not torch.equal(run(pipe, inputs, adapter=adapter, coarse="adapter-delta"), direct)


def test_corrections_shrink_with_what_there_is_to_correct():
    """Where the last two predictions agree, a trained correction counts as good as nothing."""
    pipe, inputs = CASES["flux"]()
    adapter, plain = trained(pipe), fresh(pipe)
    for one in (adapter, plain):
        with torch.no_grad():
            for k in (2, 4):
                one.size(k).trust.fill_(1 / 20)  # g = 1: what is left is the forecast and the correction
    schedule = [1, 1, 1, 2, 1, 1, 2, 1]

    def corrections():
        runs = [run(pipe, inputs, schedule=schedule, adapter=one) for one in (adapter, plain)]
        return float((runs[0] - runs[1]).abs().max())

    lively = corrections()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()  # the same prediction at every step
    assert lively > 1e-3 and corrections() < lively / 100


def test_coarse_first_step_needs_no_memory():
    pipe, inputs = CASES["flux"]()
    found = run(pipe, inputs, adapter=trained(pipe), schedule=[2, 2, 1, 2, 4, 1, 2, 4])
    assert bool(torch.isfinite(found).all())


def add_style(pipe, name="style"):
    torch.manual_seed(5)
    targets = ["ff.net.0.proj", "proj_mlp", "to_q"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)


def test_style_lora_and_adapter_compose():
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    without_style = run(pipe, inputs, adapter=adapter)
    add_style(pipe)
    styled = tiny.latents_of(pipe, inputs)
    assert torch.equal(run(pipe, inputs, adapter=adapter, schedule=[1] * 8), styled)
    both = run(pipe, inputs, adapter=adapter)
    assert not torch.allclose(both, without_style)
    pipe.transformer.set_adapters(["style"], [0.0])
    torch.testing.assert_close(run(pipe, inputs, adapter=adapter), without_style, rtol=1e-4, atol=1e-4)
    assert pipe.transformer.active_adapters() == ["style"]


def test_style_lora_that_comes_and_goes_while_accelerated():
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    with ddit_rt.accelerated(pipe, adapter=adapter, schedule=SCHEDULE):
        before = tiny.latents_of(pipe, inputs)
        add_style(pipe)
        assert not torch.allclose(tiny.latents_of(pipe, inputs), before)
        pipe.transformer.unload_lora()
        assert torch.equal(tiny.latents_of(pipe, inputs), before)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["flux-batch-odd", "wan-image"])
def test_merged_weights_compute_the_same(name, shared):
    pipe, inputs = CASES[name]()
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    adapter = trained(pipe, shared=shared)
    beside = run(pipe, inputs, adapter=adapter)
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, adapter=adapter, merge_adapter=True):
        merged = tiny.latents_of(pipe, inputs)
        spent = ddit_rt.report(pipe).steps[3].flops
        assert all(torch.equal(weight, before[name]) for name, weight in pipe.transformer.state_dict().items())
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, adapter=adapter):
        tiny.latents_of(pipe, inputs)
        assert spent < ddit_rt.report(pipe).steps[3].flops
    assert not torch.allclose(merged, run(pipe, inputs, adapter=fresh(pipe, shared=shared)))


CHANGES = {
    "in place": lambda pipe: pipe.transformer.transformer_blocks[0].ff.net[2].weight.detach().mul_(1.5),
    "without a trace": lambda pipe: pipe.transformer.transformer_blocks[0].ff.net[2].weight.data.mul_(1.5),
    "a style lora": lambda pipe: add_style(pipe),
    "a fused one": lambda pipe: (add_style(pipe), pipe.fuse_lora()),
    "a fused one, unloaded": lambda pipe: (add_style(pipe), pipe.fuse_lora(), pipe.transformer.unload_lora()),
    "a hook": lambda pipe: pipe.transformer.single_transformer_blocks[0].proj_mlp.register_forward_hook(
        lambda module, args, output: output * 1.5
    ),
    "another dtype": lambda pipe: pipe.transformer.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_merged_weights_follow_the_models(change):
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    if change == "another dtype":
        inputs = {name: value.double() if torch.is_tensor(value) else value for name, value in inputs.items()}
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, adapter=adapter, merge_adapter=True):
        before = None if change == "another dtype" else tiny.latents_of(pipe, inputs)
        CHANGES[change](pipe)
        after = tiny.latents_of(pipe, inputs)
    assert before is None or not torch.allclose(after, before)
    torch.testing.assert_close(after, run(pipe, inputs, adapter=adapter), rtol=1e-4, atol=1e-4)


@pytest.fixture
def merges(monkeypatch):
    """Shapes of the weights that were merged."""
    seen, own = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda weight, *a, **k: seen.append(tuple(weight.shape)) or own(weight, *a, **k)
    )
    return seen


def test_weights_are_merged_again_only_when_they_changed(merges):
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    layers = [len(adapter.lora(k).by_layer) for k in (2, 4)]
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, adapter=adapter, merge_adapter=True):
        first = tiny.latents_of(pipe, inputs)
        assert len(merges) == sum(layers)
        assert torch.equal(tiny.latents_of(pipe, inputs), first) and len(merges) == sum(layers)
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
            adapter.lora(2).by_layer["transformer_blocks.0.ff.net.2"].lora_B.weight.mul_(2)
        second = tiny.latents_of(pipe, inputs)
        assert len(merges) == sum(layers) + 2 and not torch.equal(first, second)
        tiny.latents_of(pipe, inputs)
        assert len(merges) == sum(layers) + 2


def test_weights_that_count_no_versions_are_merged_once_in_every_call(merges):
    with torch.inference_mode():
        pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, adapter=adapter, merge_adapter=True):
        for calls in (1, 2):
            tiny.latents_of(pipe, inputs)
            assert len(merges) == calls * sum(len(adapter.lora(k).by_layer) for k in (2, 4))


def test_merging_in_inference_mode():
    with torch.inference_mode():
        pipe, inputs = CASES["flux"]()
        beside = run(pipe, inputs, adapter=trained(pipe))
        torch.testing.assert_close(
            run(pipe, inputs, adapter=trained(pipe), merge_adapter=True), beside, rtol=1e-4, atol=1e-4
        )


def test_merging_needs_an_adapter():
    with pytest.raises(ConfigError, match="no adapter to merge"):
        ddit_rt.accelerate(tiny.flux(), merge_adapter=True)


TARGETS = {
    "feed-forward": {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"},
    "attention": {
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    },
    r".*\.0\.attn\.to_[qv]": {"attn.to_q", "attn.to_v"},
}


@pytest.mark.parametrize(
    "targets", [("feed-forward",), ("attention",), ("attention", r".*\.0\.attn\.to_[qv]"), (*TARGETS,)]
)
def test_lora_goes_where_it_is_wanted(targets):
    pipe, inputs = CASES["flux"]()
    adapter = fresh(pipe, targets=targets)
    blocks = {path.split(".", 2)[2] for path in adapter.spec.layers}
    assert blocks == set().union(*(TARGETS[target] for target in targets))
    assert all(path.split(".")[0].endswith("transformer_blocks") for path in adapter.spec.layers)
    before = run(pipe, inputs, coarse="adapter", adapter=adapter)
    for path in adapter.spec.layers:
        weight = adapter.lora(2).pairs[path.replace(".", "/")].lora_B.weight.detach()
        weight.fill_(0.05)
        assert not torch.equal(run(pipe, inputs, coarse="adapter", adapter=adapter), before), path
        weight.zero_()


def test_lora_on_the_attention_of_a_video_model():
    pipe, inputs = CASES["wan-image"]()
    adapter = trained(pipe, targets=("attention",))
    assert {path.split(".", 2)[2] for path in adapter.spec.layers} >= {"attn1.to_q", "attn2.to_v", "attn2.to_out.0"}
    plain = run(pipe, inputs, coarse="adapter", adapter=fresh(pipe, targets=("attention",)))
    assert not torch.equal(run(pipe, inputs, coarse="adapter", adapter=adapter), plain)


@pytest.mark.parametrize(("target", "match"), [("atention", "matches no linear layer"), ("(", "no regular expression")])
def test_unknown_targets(target, match):
    with pytest.raises(ConfigError, match=match):
        fresh(tiny.flux(), targets=("feed-forward", target))


def test_a_users_lora_adds_no_layers_to_those_that_a_target_names():
    pipe, target = tiny.flux(), r".*\.ff\..*"
    plain = fresh(pipe, targets=(target,)).spec.layers
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"]))
    assert fresh(pipe, targets=(target,)).spec.layers == plain


def test_an_adapter_of_a_shallower_model_with_the_same_embedding_is_refused():
    pipe = tiny.flux()
    adapter, older = fresh(pipe), fresh(pipe)
    older.spec = replace(older.spec, blocks=None)
    with torch.no_grad():
        for weight in pipe.transformer.transformer_blocks.parameters():
            weight.mul_(1.1)
    ddit_rt.restore(ddit_rt.accelerate(pipe, adapter=adapter))  # trained on, it still is the model's
    pipe.transformer.single_transformer_blocks.append(copy.deepcopy(pipe.transformer.single_transformer_blocks[0]))
    with pytest.raises(AdapterMismatchError, match="made for blocks=2, transformer has blocks=3"):
        ddit_rt.accelerate(pipe, adapter=adapter)
    ddit_rt.accelerate(pipe, adapter=older)


@pytest.mark.parametrize(
    "options",
    [{"targets": "feed-forward"}, {"targets": None}, {"targets": (1,)}, {"multiples": 2}, {"alpha": "x"}],
    ids=str,
)
def test_values_of_another_kind_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r}: ")):
        fresh(tiny.flux(), **options)


def test_lora_on_layers_that_are_fused_away_is_refused():
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe, targets=("attention",))
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, coarse="adapter", adapter=adapter):
        expected = tiny.latents_of(pipe, inputs)
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(AdapterMismatchError, match="unfuse_qkv_projections"):
            tiny.latents_of(pipe, inputs)
    with pytest.raises(AdapterMismatchError, match="no such layer in use"):
        ddit_rt.accelerate(pipe, coarse="adapter", adapter=adapter)
    pipe.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(run(pipe, inputs, coarse="adapter", adapter=adapter), expected)


def test_half_precision():
    pipe, inputs = tiny.flux(dtype=torch.bfloat16), tiny.flux_inputs(dtype=torch.bfloat16)
    found = run(pipe, inputs, adapter=trained(tiny.flux()))
    assert found.dtype == torch.bfloat16 and bool(torch.isfinite(found).all())


def test_report_counts_the_adapters_work():
    pipe, inputs = CASES["flux"]()
    costs = {}
    for name, settings in {"band-split": {"coarse": "band-split"}, "adapter": {"adapter": fresh(pipe)}}.items():
        with ddit_rt.accelerated(pipe, schedule=SCHEDULE, **settings):
            tiny.latents_of(pipe, inputs)
            costs[name] = sum(step.flops for step in ddit_rt.report(pipe).steps)
    assert costs["adapter"] > costs["band-split"]


@pytest.mark.parametrize("coarse", ["adapter", "adapter-delta"])
def test_needs_an_adapter(coarse):
    pipe = tiny.flux()
    with pytest.raises(ddit_rt.ConfigError, match="needs adapter="):
        ddit_rt.accelerate(pipe, coarse=coarse)
    with pytest.raises(ddit_rt.AdapterMismatchError, match="multiples"):
        ddit_rt.accelerate(pipe, adapter=fresh(pipe, multiples=(2,)))
    assert "_ddit_pipeline" not in pipe.__dict__
    ddit_rt.accelerate(pipe, adapter=fresh(pipe, multiples=(2,)), config=DDiTConfig(multiples=(1, 2)))


def test_coarse_runs_end_where_training_did():
    pipe, inputs = CASES["flux"]()
    adapter = trained(pipe)
    adapter.spec = replace(adapter.spec, training={"max_gap": 2})
    found = {}
    for limit in ("auto", None):
        settings = {"schedule": None, "threshold": 1e9, "multiples": (1, 2), "order": 1, "initial_full_steps": 0}
        with ddit_rt.accelerated(pipe, adapter=adapter, max_consecutive_coarse=limit, **settings):
            tiny.latents_of(pipe, inputs)
            found[limit] = [step.multiple for step in ddit_rt.report(pipe).steps]
    assert found == {"auto": [1, 2, 2, 1, 2, 2, 1, 2], None: [1] + [2] * 7}


@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_an_addition_is_made_in_place_unless_gradients_are_recorded(alpha):
    torch.manual_seed(0)
    layer, pair = torch.nn.Linear(6, 10), LowRank(6, 10, 4, alpha)
    torch.nn.init.normal_(pair.lora_B.weight)
    inputs = torch.randn(2, 3, 6)
    with_gradient = pair.add_to(layer(inputs), inputs)
    wanted = layer(inputs) + pair.scale * inputs @ (pair.lora_B.weight @ pair.lora_A.weight).T
    assert torch.allclose(with_gradient, wanted, atol=1e-6) and with_gradient.requires_grad
    with torch.no_grad():
        made = layer(inputs)
        assert pair.add_to(made, inputs) is made and torch.allclose(made, wanted, atol=1e-6)
        turned = layer(inputs).transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
        assert torch.allclose(pair.add_to(turned, inputs), wanted, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(pair.add_to(layer(inputs), inputs).float(), wanted, atol=0.1)
