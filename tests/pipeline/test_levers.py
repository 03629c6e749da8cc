"""Modulations made ahead, and text without its padding: what they compute, in which steps, and what they refuse."""

import logging

import pytest
import torch
from adapters import trained
from cases import FLUX
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from recorded import recorded
from tiny import flux, flux_inputs, latents_of, wan

import ddit_rt
from ddit_rt import ConfigError, TeaCacheConfig
from ddit_rt.demo import load_pipeline
from ddit_rt.families import family_of
from ddit_rt.granularity.paths.band_split import BandSplitPath
from ddit_rt.pipeline import call_arguments

SCHEDULE = (1, 1, 2, 4, 1, 0, 4, 2)
CALLS = {name: case for name, case in FLUX.items() if name != "flux-decoded"}


def chosen(index, patch_std):
    return SCHEDULE[index]


def run(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, **settings):
        found = latents_of(pipe, inputs)
        return found, ddit_rt.report(pipe)


class Counter:
    """Counts the calls of modules, and the rows they are given."""

    def __init__(self, *modules):
        self.rows = []
        self._hooks = [
            m.register_forward_hook(lambda _, given, __: self.rows.append(given[0].shape[0])) for m in modules
        ]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("settings", [{"schedule": chosen}, {"schedule": chosen, "coarse": "naive"}, {"speedup": 2}])
def test_modulations_made_ahead_are_the_steps_own(call, settings):
    pipe, inputs = CALLS[call]()
    wanted, _ = run(pipe, inputs, **settings)
    plain = latents_of(pipe, inputs)
    found, report = run(pipe, inputs, modulation="ahead", **settings)
    # sums in another order: float32 differs in its last bits, and eight steps hand that on
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()
    assert torch.equal(latents_of(pipe, inputs), plain)
    assert report.schedule


def test_bfloat16_agrees_to_its_rounding():
    pipe, inputs = flux(dtype=torch.bfloat16, guidance=True), flux_inputs(dtype=torch.bfloat16)
    wanted, _ = run(pipe, inputs, schedule=SCHEDULE)
    found, _ = run(pipe, inputs, schedule=SCHEDULE, modulation="ahead")
    assert (found.float() - wanted.float()).norm() <= 0.02 * wanted.float().norm()


def test_one_product_per_layer_serves_all_steps():
    pipe, inputs = flux(), flux_inputs()
    block = pipe.transformer.single_transformer_blocks[0]
    counter = Counter(block.norm.linear, pipe.transformer.time_text_embed)
    run(pipe, inputs, schedule=SCHEDULE, modulation="ahead")
    # hooks on these layers are none of offloading's: one call per size, each with a row per step
    assert counter.rows == [8] * 6
    counter.rows.clear()
    run(pipe, inputs, schedule=SCHEDULE)
    assert set(counter.rows) == {1} and len(counter.rows) > 12


@pytest.mark.parametrize("settings", [{}, {"coarse": "naive"}, {"cache": TeaCacheConfig(1.5, (0.0, 1.0))}])
def test_graphs_read_modulations_of_the_step(settings):
    pipe, inputs = flux(guidance=True), flux_inputs()
    wanted, _ = run(pipe, inputs, schedule=SCHEDULE, modulation="ahead", **settings)
    recording = recorded(pipe, schedule=SCHEDULE, modulation="ahead", **settings)
    assert torch.equal(latents_of(pipe, inputs), wanted) and recording.replays
    captures = recording.captures
    other = {**inputs, "generator": torch.Generator().manual_seed(4), "guidance_scale": 2.0}
    second = latents_of(pipe, other)
    assert recording.captures == captures
    ddit_rt.restore(pipe)
    again, _ = run(pipe, other, schedule=SCHEDULE, modulation="ahead", **settings)
    assert torch.equal(again, second) and not torch.equal(second, wanted)


@pytest.mark.parametrize("coarse", ["adapter", "adapter-delta", "band-split", "naive", "extrapolate"])
def test_every_coarse_path_is_told_what_it_would_tell(coarse):
    pipe, inputs = flux(), flux_inputs()
    settings = {"coarse": coarse, "schedule": SCHEDULE, "adapter": trained(pipe) if "adapter" in coarse else None}
    wanted, _ = run(pipe, inputs, **settings)
    found, _ = run(pipe, inputs, modulation="ahead", **settings)
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def test_a_path_that_does_not_say_what_it_tells_has_its_coarse_steps_make_their_own(monkeypatch):
    monkeypatch.setattr(BandSplitPath, "told_level", "")
    pipe, inputs = flux(), flux_inputs()
    wanted, _ = run(pipe, inputs, schedule=SCHEDULE)
    counter = Counter(pipe.transformer.time_text_embed)
    found, _ = run(pipe, inputs, schedule=SCHEDULE, modulation="ahead")
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()
    assert sorted(counter.rows)[-1] == 8 and counter.rows.count(8) == 1 and counter.rows.count(1) > 3


def test_diffusers_caches_go_with_modulation_ahead():
    pipe, inputs = flux(), flux_inputs()
    settings = {"schedule": SCHEDULE, "cache": FirstBlockCacheConfig(threshold=1e-9)}
    wanted, _ = run(pipe, inputs, **settings)
    found, _ = run(pipe, inputs, modulation="ahead", **settings)
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def test_weights_changed_between_calls_are_read():
    pipe, inputs = flux(), flux_inputs()
    ddit_rt.accelerate(pipe, schedule=SCHEDULE, modulation="ahead")
    before = latents_of(pipe, inputs)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["norm.linear", "norm1.linear"], init_lora_weights=False)
    )
    with_lora = latents_of(pipe, inputs)
    assert not torch.equal(with_lora, before)
    ddit_rt.restore(pipe)
    wanted, _ = run(pipe, inputs, schedule=SCHEDULE)
    assert (with_lora - wanted).norm() <= 2e-5 * wanted.norm()


def test_compiled_blocks_are_not_compiled_again_for_every_step():
    pipe, inputs = flux(), flux_inputs()
    wanted, _ = run(pipe, inputs, schedule=(1,) * 8)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with ddit_rt.accelerated(pipe, schedule=(1,) * 8, modulation="ahead"):
        latents_of(pipe, inputs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = latents_of(pipe, inputs)
    torch._dynamo.reset()
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def test_who_tells_other_times_makes_modulations_in_the_step(caplog):
    pipe, inputs = flux(), flux_inputs()
    wanted, _ = run(pipe, inputs, schedule=SCHEDULE)
    counter = Counter(pipe.transformer.time_text_embed)
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ConfigError, match=r"in transformer .* is offloaded\. Leave it out"):
        ddit_rt.accelerate(pipe, modulation="ahead")
    assert not hasattr(pipe.transformer.forward, "_ddit_link")
    pipe = flux()
    ddit_rt.accelerate(pipe, schedule=SCHEDULE, modulation="ahead")
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(latents_of(pipe, inputs), wanted)
    assert "modulation='ahead' makes none" in caplog.text and counter.rows == []


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"modulation": "ahead"}, "models of family wan have none to make ahead"),
        ({"trim_text": True}, "models of family wan keep all their text"),
    ],
)
def test_models_without_the_lever_are_refused_before_anything_is_patched(settings, said):
    pipe = wan()
    with pytest.raises(ConfigError, match=said):
        ddit_rt.accelerate(pipe, **settings)
    assert not hasattr(pipe.transformer.forward, "_ddit_link")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="modulation='later': use one of 'step', 'ahead'"):
        ddit_rt.DDiTConfig(modulation="later")
    with pytest.raises(ConfigError, match="trim_text=1"):
        ddit_rt.DDiTConfig(trim_text=1)
    with pytest.raises(ConfigError, match="has none: leave one of them out"):
        ddit_rt.accelerate(flux(), trim_text=True, multiples=(1,))
    assert ddit_rt.DDiTConfig(modulation="ahead", trim_text=True).speedup == 2.0


@pytest.fixture(scope="module")
def demo():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def demo_call(prompt, **more):
    further = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "prompt": prompt, **more}
    return call_arguments("demo", steps=8, further=further)


def test_coarse_steps_keep_the_prompt_and_full_steps_all_text(demo, monkeypatch):
    seen = []
    inner = type(demo.transformer).forward

    def forward(self, *args, **kwargs):
        seen.append(
            (kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1], len(kwargs["txt_ids"]))
        )
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(type(demo.transformer), "forward", forward)
    call = demo_call("a red apple")
    with ddit_rt.accelerated(demo, schedule=SCHEDULE, trim_text=True):
        demo(**call)
        report = ddit_rt.report(demo)
    count = len(demo.tokenizer_2("a red apple").input_ids)
    kept = -(-count // 4) * 4
    assert kept < 24 and {(t, i) for n, t, i in seen if n < 256} == {(kept, kept)}
    assert {(t, i) for n, t, i in seen if n == 256} == {(24, 24)}
    with ddit_rt.accelerated(demo, schedule=SCHEDULE):
        demo(**demo_call("a red apple"))
        whole = ddit_rt.report(demo)
    pairs = list(zip(report.steps, whole.steps))
    assert all(a.flops < b.flops for a, b in pairs if a.multiple > 1)
    assert all(a.full_flops == b.full_flops for a, b in pairs)
    assert all(a.flops == b.flops for a, b in pairs if a.multiple == 1)


def test_trimming_leaves_plain_runs_alone_and_is_undone(demo):
    call = lambda: demo_call("a red apple on a black background")  # noqa: E731
    plain = demo(**call()).images
    with ddit_rt.accelerated(demo, threshold=0, trim_text=True):
        assert torch.equal(demo(**call()).images, plain)
    with ddit_rt.accelerated(demo, schedule=SCHEDULE, trim_text=True):
        trimmed = demo(**call()).images
    assert torch.equal(demo(**call()).images, plain) and not torch.equal(trimmed, plain)
    recording = recorded(demo, schedule=SCHEDULE, trim_text=True)
    assert torch.equal(demo(**call()).images, trimmed) and recording.replays
    ddit_rt.restore(demo)


def test_calls_without_a_prompt_keep_all_text(demo):
    family = family_of(demo)
    assert family.text_in_prompt(demo, {"prompt": None, "true_cfg_scale": 1.0}) is None
    long = "a red apple " * 40
    found = family.text_in_prompt(demo, {"prompt": ["a", long], "true_cfg_scale": 1.0, "max_sequence_length": 24})
    assert found == 24
    guided = {"prompt": "a", "negative_prompt": "a red apple", "true_cfg_scale": 2.0, "max_sequence_length": 24}
    assert family.text_in_prompt(demo, guided) == len(demo.tokenizer_2("a red apple").input_ids)
    pipe, inputs = flux(), flux_inputs()
    wanted, _ = run(pipe, inputs, schedule=SCHEDULE)
    assert torch.equal(run(pipe, inputs, schedule=SCHEDULE, trim_text=True)[0], wanted)


def texts_of(pipe, call, **settings):
    """Tokens of text in every coarse run of the transformer."""
    full, coarse = [], []

    def see(module, args, given):
        runs = full if given["hidden_states"].shape[1] == 256 else coarse
        runs.append(given["encoder_hidden_states"].shape[1])

    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(see, with_kwargs=True)
    with ddit_rt.accelerated(pipe, trim_text=True, **settings):
        pipe(**call)
    hook.remove()
    assert set(full) == {24}
    return coarse


def test_a_textual_inversion_counts_as_all_its_vectors(monkeypatch):
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = texts_of(pipe, demo_call("a <cat>"), schedule=SCHEDULE)
    pipe.tokenizer_2.add_tokens(["<cat>", *(f"<cat>_{i}" for i in range(1, 12))])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2))
    after = texts_of(pipe, demo_call("a <cat>"), schedule=SCHEDULE)
    expanded = pipe.maybe_convert_prompt("a <cat>", pipe.tokenizer_2)
    assert len(set(after)) == 1 and after[0] >= len(pipe.tokenizer_2(expanded).input_ids) > before[0]


@pytest.mark.parametrize("guidance", ["never", "coarse"])
@pytest.mark.parametrize("in_place", [False, True])
def test_text_that_a_callback_exchanges_is_kept_whole(demo, in_place, guidance):
    (longer, *_) = demo.encode_prompt("a red apple on a black background and more", max_sequence_length=24)

    def exchange(pipe, index, timestep, given):
        if index != 3:
            return {}
        return {"prompt_embeds": given["prompt_embeds"].copy_(longer) if in_place else longer}

    call = demo_call("a", negative_prompt="a", true_cfg_scale=2.0, callback_on_step_end=exchange)
    call["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    coarse = texts_of(demo, call, schedule=(1, 2, 2, 2, 2, 2, 2, 1), batch_guidance=guidance, coarse="band-split")
    kept = coarse[0]
    # by itself the call for the negative prompt still has the text that it began with
    after = [24, kept] if guidance == "never" else [24]
    assert kept < 24 and coarse == [kept] * 3 * len(after) + after * 3


def test_both_levers_and_a_schedule_come_off_bit_for_bit(demo):
    call = lambda: demo_call("zebras behind a fence")  # noqa: E731
    plain, modules = demo(**call()).images, dict(demo.transformer.named_modules())
    with ddit_rt.accelerated(demo, schedule=SCHEDULE, trim_text=True, modulation="ahead"):
        demo(**call())
    assert torch.equal(demo(**call()).images, plain)
    assert list(modules.items()) == list(demo.transformer.named_modules())
