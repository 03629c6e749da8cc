"""ComfyUI: an accelerated model inside a double of its sampling, beside ddit_rt's pipeline on the same transformer."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_double import (
    BaseModel,
    CleanSampling,
    FlowSampling,
    Flux,
    Guider,
    ModelPatcher,
    NoiseSampling,
    Points,
    Sampler,
    condition,
    sample_dpm_2,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)
from diffusers import FluxTransformer2DModel
from tiny import flux, flux_inputs, negative, smooth

import ddit_rt
from ddit_rt import ConfigError, FittedSchedule, ScheduleError, UnsupportedPipelineError
from ddit_rt.families import FAMILIES
from ddit_rt.granularity import Geometry
from ddit_rt.integrations.comfyui import attach, attached, settings
from ddit_rt.integrations.comfyui.cost import Cost

MIXED = [1, 1, 0, 1, 0, 0, 1, 1, 0, 1]
COARSE = [1, 1, 2, 0, 1, 2, 2, 1, 4, 1]
EULER = Sampler(sample_euler)


@pytest.fixture(scope="module")
def pipe():
    return smooth(flux())


def patcher(pipe, sampling=None):
    return ModelPatcher(BaseModel(Flux(pipe.transformer), sampling or FlowSampling()))


def noise(height=16, width=16, batch=1):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(3))


def conditions(inputs, **more):
    made = [condition(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], **more)]
    if "negative_prompt_embeds" not in inputs:
        return made, None, 1.0
    against = condition(inputs["negative_prompt_embeds"], inputs["negative_pooled_prompt_embeds"], **more)
    return made, [against], inputs["true_cfg_scale"]


def levels(steps=10):
    """Noise levels of Flux at some shift."""
    even = torch.linspace(1, 0, steps + 1)
    return 2 * even / (1 + even)


def sampled(model, inputs=None, sampler=EULER, sigmas=None, z=None, together=True, **more):
    guider = Guider(model, *conditions(inputs or flux_inputs(), **more), together=together)
    return guider.sample(noise() if z is None else z, sampler, levels() if sigmas is None else sigmas)


def fitted(tmp_path, schedule, **more):
    return str(FittedSchedule(schedule, 2.0, 40.0, 4, **more).save(tmp_path / "schedule.json"))


def accelerated(pipe, tmp_path, schedule, **more):
    return attach(patcher(pipe), settings(schedule=fitted(tmp_path, schedule), **more), Points)


def packed(latent):
    batch, channels, height, width = latent.shape
    tokens = latent.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, -1, channels * 4)


def sizes(model):
    return attached(model).report.schedule


@pytest.mark.parametrize("guided", [False, True], ids=["single", "guided"])
@pytest.mark.parametrize("how", ["threshold", "schedule", "multiples", "no step skipped"])
def test_nothing_to_save_is_the_plain_run_bit_for_bit(pipe, tmp_path, guided, how):
    config = {
        "threshold": lambda: settings(speedup=0, threshold=0.0),
        "schedule": lambda: settings(schedule=fitted(tmp_path, [1] * 10)),
        "multiples": lambda: settings(speedup=1, threshold=1.0, multiples="1"),
        "no step skipped": lambda: settings(speedup=1.05),
    }[how]()
    inputs = negative(flux_inputs()) if guided else flux_inputs()
    plain = sampled(patcher(pipe), inputs)
    model = attach(patcher(pipe), config, Points)
    if how == "no step skipped":
        assert not torch.equal(sampled(model, inputs), plain) and sizes(model).count(0) == 1
        return
    assert torch.equal(sampled(model, inputs), plain)
    assert sizes(model) == [1] * 10 and attached(model).report.complete


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two"])
@pytest.mark.parametrize("guided", [False, True], ids=["single", "guided"])
@pytest.mark.parametrize("schedule", [MIXED, COARSE], ids=["skipped", "coarse too"])
@pytest.mark.parametrize("coarse", ["delta", "band-split"])
def test_the_picture_is_that_of_the_diffusers_pipeline(tmp_path, schedule, guided, together, coarse):
    pipe, z = smooth(flux()), noise()
    inputs = flux_inputs(steps=10, sigmas=None, latents=packed(z))
    inputs = negative(inputs) if guided else inputs
    model = accelerated(pipe, tmp_path, schedule, coarse=coarse)
    with ddit_rt.accelerated(pipe, schedule=schedule, coarse=coarse, cuda_graphs=False):
        expected = pipe(**inputs).images
        report = ddit_rt.report(pipe)
    found = packed(sampled(model, inputs, sigmas=pipe.scheduler.sigmas, z=z, together=together))
    assert sizes(model) == report.schedule == schedule
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [step.tokens for step in attached(model).report.steps] == [step.tokens for step in report.steps]


def test_moved_noise_levels_are_those_of_the_diffusers_pipeline(tmp_path):
    pipe, z = smooth(flux()), noise()
    moved = [1.0, 0.98, 0.93, 0.85, 0.7, 0.6, 0.45, 0.3, 0.2, 0.1, 0.0]
    schedule = FittedSchedule(MIXED, 2.0, 40.0, 4, sigmas=moved, reference="converged")
    inputs = flux_inputs(steps=10, latents=packed(z))
    with ddit_rt.accelerated(pipe, schedule=schedule, cuda_graphs=False):
        expected = pipe(**inputs).images
    model = attach(patcher(pipe), settings(schedule=str(schedule.save(tmp_path / "moved.json"))), Points)
    found = packed(sampled(model, inputs, z=z))
    assert [step.sigma for step in attached(model).report.steps] == pytest.approx(moved[:-1])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ConfigError, match=r"noise levels of its own, which sampler heun .*--reference plain"):
        sampled(model, inputs, Sampler(sample_heun))
    with pytest.raises(ConfigError, match=r"a run from noise level 0\.500 cannot follow"):
        sampled(model, inputs, sigmas=levels() / 2)
    with pytest.raises(ConfigError, match=r"a run down to noise level 0\.6\d\d cannot follow: .*leftover noise"):
        sampled(model, inputs, sigmas=levels(20)[:11])  # the first part of split sigmas


def test_a_speedup_skips_steps_and_the_report_tells(pipe):
    model = attach(patcher(pipe), settings(speedup=2.5), Points)
    sampled(model)
    report, module = attached(model).report, model.model.diffusion_model
    assert sizes(model).count(1) == len(module.calls) == 4 and sizes(model).count(0) == 6
    assert report.speedup_estimate == pytest.approx(2.5)
    assert "2.50x fewer FLOP" in str(report)


def test_the_threshold_rule_sees_the_latent_evolve(pipe):
    model = attach(patcher(pipe), settings(speedup=0, threshold=1e9), Points)
    sampled(model)
    steps = attached(model).report.steps
    assert 4 in sizes(model) and sizes(model)[:3] == [1, 1, 1]
    assert not steps[0].patch_std and set(steps[5].patch_std) == {1, 2, 4}
    coarse = [shape[2:] for shape, _, _ in model.model.diffusion_model.calls if shape[2:] != (16, 16)]
    assert coarse and set(coarse) == {(4, 4)}


def test_the_estimate_is_near_the_count_of_flux():
    """Of FLUX.1 at 1024 x 1024, in diffusers' module; the count itself is tested with its family."""
    with torch.device("meta"):
        model = FluxTransformer2DModel()
    cost, family = Cost.of(model), next(found for found in FAMILIES if found.name == "flux")
    assert cost.blocks == 57 and cost.width == 3072
    geometry = Geometry(16, 1, 128, 128, 2)
    for multiple in (1, 2, 4):
        counted = family.flops(model, geometry, multiple, 512)
        assert cost.flops(geometry.tokens(multiple), 512, 1) == pytest.approx(counted, rel=0.03)


def test_coarse_tokens_lie_where_the_settings_say(pipe, tmp_path):
    schedule = [1, 1, 2, 1, 4, 1, 1, 1, 1, 1]
    for positions in ("native", "interpolated"):
        model = accelerated(pipe, tmp_path, schedule, coarse="band-split", positions=positions)
        sampled(model)
        ropes = {shape[2]: rope for shape, _, rope in model.model.diffusion_model.calls}
        if positions == "native":
            assert ropes == {16: None, 8: None, 4: None}
        else:
            assert ropes[16] is None
            assert ropes[8] == {"scale_x": 2.0, "scale_y": 2.0, "shift_x": 0.5, "shift_y": 0.5}
            assert ropes[4] == {"scale_x": 4.0, "scale_y": 4.0, "shift_x": 1.5, "shift_y": 1.5}


def test_positions_need_a_model_that_reads_them(pipe):
    class Deaf(torch.nn.Module):
        __module__ = "tiny"  # whose text says nothing of them

    with pytest.raises(ConfigError, match=r"Deaf of this ComfyUI reads no rope_options; use 'native'"):
        attach(ModelPatcher(BaseModel(Deaf(), FlowSampling())), settings(positions="interpolated"), Points)


def test_the_time_of_a_coarse_run_is_that_of_its_noise_level(pipe, tmp_path):
    model = accelerated(pipe, tmp_path, [1, 1, 1, 2, 1, 1, 1, 1, 1, 1], coarse="band-split")
    model.model.model_sampling = FlowSampling(1000)
    sampled(model)
    sigma = float(levels()[3])
    (time,) = [time for shape, time, _ in model.model.diffusion_model.calls if shape[2] == 8]
    assert time == pytest.approx(1000 * sigma / 2 / ((1 - sigma) + sigma / 2), rel=1e-5)


@pytest.mark.parametrize("name", ["ref_latents", "control"])
def test_references_and_controls_keep_the_models_own_size(pipe, tmp_path, name):
    model = accelerated(pipe, tmp_path, COARSE)
    given = {"ref_latents": [torch.zeros(1, 4, 8, 8)], "control": {"input": [torch.zeros(1)]}}[name]
    sampled(model, **{name: given})
    steps = attached(model).report.steps
    assert sizes(model) == [1 if multiple > 1 else multiple for multiple in COARSE]
    assert steps[2].note == f"{name} is of the model's own token grid"
    assert {shape[2] for shape, _, _ in model.model.diffusion_model.calls} == {16}


def test_a_forward_without_names_keeps_the_models_own_size(pipe, tmp_path):
    class Unnamed(Flux):
        def _forward(self, *args, **extra):
            return super()._forward(*args, **extra)

    model = ModelPatcher(BaseModel(Unnamed(pipe.transformer), FlowSampling()))
    model = attach(model, settings(schedule=fitted(tmp_path, COARSE)), Points)
    sampled(model)
    assert sizes(model) == [1 if multiple > 1 else multiple for multiple in COARSE]
    assert attached(model).report.steps[2].note == "the model's forward does not name what it is given"


def test_patches_of_other_nodes_keep_the_models_own_size(pipe, tmp_path):
    model = accelerated(pipe, tmp_path, COARSE)
    model.model_options["transformer_options"]["patches_replace"] = {"dit": {("double_block", 0): object()}}
    sampled(model)
    assert {shape[2] for shape, _, _ in model.model.diffusion_model.calls} == {16}


def test_every_conditioning_has_a_past_of_its_own(pipe, tmp_path):
    """The negative one begins in mid-run, on a skipped step: it runs the model there, and the positive one does not."""
    inputs = negative(flux_inputs())
    positive, against, scale = conditions(inputs)
    against[0]["start"] = float(levels()[5])
    positive[0]["end"] = 0.0
    model = accelerated(pipe, tmp_path, MIXED)

    class Late(Guider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            kept = self.negative
            self.negative = kept if float(timestep[0]) <= against[0]["start"] else None
            try:
                return super().predict_noise(x, timestep, model_options, seed)
            finally:
                self.negative = kept

    latent = Late(model, positive, against, scale, together=False).sample(noise(), EULER, levels())
    assert torch.isfinite(latent).all()
    steps = attached(model).report.steps
    assert steps[5].note == "a conditioning without a prediction to go on from ran full"
    assert MIXED[5] == 0 and 0 < steps[5].flops < steps[5].full_flops


def test_two_prompts_in_one_run_do_not_mix(pipe, tmp_path):
    """The mean of two conditionings is that of the same conditioning twice, and differs from another's."""
    inputs = flux_inputs()
    same = [condition(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"]) for _ in range(2)]
    other = [same[0], condition(-inputs["prompt_embeds"], -inputs["pooled_prompt_embeds"])]
    runs = {}
    for name, found in {"one": same[:1], "twice": same, "two": other, "shared": [same[0], same[0]]}.items():
        for together in (True, False):
            model = accelerated(pipe, tmp_path, COARSE)
            runs[name, together] = Guider(model, found, together=together).sample(noise(), EULER, levels())
            assert sizes(model) == COARSE
    size = runs["one", True].abs().max()
    for name in ("twice", "shared"):
        assert (runs[name, True] - runs["one", True]).abs().max() < 1e-5 * size
    assert (runs["two", True] - runs["two", False]).abs().max() < 1e-5 * size
    assert (runs["two", True] - runs["one", True]).abs().max() > 1e-3 * size


def test_no_run_leaves_anything_to_the_next(pipe, tmp_path):
    model = accelerated(pipe, tmp_path, COARSE)
    first = sampled(model)
    before = {**model.model_options["transformer_options"]}
    sampled(model, negative(flux_inputs()))
    sampled(model, z=noise(24, 16))
    calls = iter(range(100))

    def cancelled(function, x, sigmas):
        def asked(latent, sigma):
            if next(calls) == 4:
                raise KeyboardInterrupt
            return function(latent, sigma)

        return sample_euler(asked, x, sigmas)

    cancelled.__name__ = "sample_euler"
    with pytest.raises(KeyboardInterrupt):
        sampled(model, sampler=Sampler(cancelled))
    report = attached(model).report
    assert not report.complete and report.schedule == COARSE[:4]
    assert model.model_options["transformer_options"] == before
    assert torch.equal(sampled(model), first) and attached(model).report.complete


def test_a_model_that_is_asked_outside_of_a_run_runs_plain(pipe, tmp_path):
    inputs = flux_inputs()
    model = accelerated(pipe, tmp_path, MIXED)
    given = (noise(), torch.ones(1), inputs["prompt_embeds"], inputs["pooled_prompt_embeds"])
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "uuids": ["a"]}
    with torch.no_grad():
        outside = model.model.diffusion_model(*given, transformer_options=options)
        assert torch.equal(outside, model.model.diffusion_model(*given))


def test_other_samplers_skip_along_a_line(pipe, tmp_path):
    plain = sampled(patcher(pipe), sampler=Sampler(sample_heun))
    model = accelerated(pipe, tmp_path, MIXED)
    found = sampled(model, sampler=Sampler(sample_heun))
    steps = attached(model).report.steps
    assert sizes(model) == MIXED and steps[2].note == "heun: skipped steps follow a line, uncorrected"
    # all but the first level are asked for twice
    assert len(model.model.diffusion_model.calls) == 2 * MIXED.count(1) - 1
    reused = sampled(attach(patcher(pipe), settings(speedup=5), Points), sampler=Sampler(sample_heun))
    assert 0 < (found - plain).norm() < (reused - plain).norm() < 0.1 * plain.norm()


def test_calls_between_noise_levels_run_and_count(pipe, tmp_path):
    model = accelerated(pipe, tmp_path, MIXED)
    sampled(model, sampler=Sampler(sample_dpm_2))
    report = attached(model).report
    assert report.schedule == MIXED and len(model.model.diffusion_model.calls) == MIXED.count(1) + 10
    assert report.speedup_estimate == pytest.approx(20 / (MIXED.count(1) + 10))
    assert report.steps[0].note == "the sampler also asked between noise levels, and got a full run"


def test_samplers_that_add_noise_run_plain(pipe, tmp_path):
    sampler = Sampler(sample_euler_ancestral)
    model = accelerated(pipe, tmp_path, MIXED)
    assert torch.equal(sampled(model, sampler=sampler), sampled(patcher(pipe), sampler=sampler))
    assert sizes(model) == [1] * 10
    assert attached(model).report.steps[3].note == "euler_ancestral adds noise in its steps"
    churning = sampled(model, sampler=Sampler(sample_euler, s_churn=1.0))
    assert torch.equal(churning, sampled(patcher(pipe)))


def test_context_windows_run_plain(pipe, tmp_path):
    model = accelerated(pipe, tmp_path, MIXED)
    model.model_options["context_handler"] = object()
    assert torch.equal(sampled(model), sampled(patcher(pipe)))
    assert attached(model).report.steps[3].note == "context windows move between steps"


def test_a_model_without_wrappers_is_told_of(tmp_path, pipe):
    class Silent(Flux):
        forward = Flux._forward

    plain = sampled(ModelPatcher(BaseModel(Silent(pipe.transformer), FlowSampling())))
    model = ModelPatcher(BaseModel(Silent(pipe.transformer), FlowSampling()))
    model = attach(model, settings(schedule=fitted(tmp_path, MIXED)), Points)
    assert torch.equal(sampled(model), plain)
    assert {step.note for step in attached(model).report.steps} == {
        "the model calls no DIFFUSION_MODEL wrappers, and ran plain"
    }


def test_what_is_refused(pipe, tmp_path):
    with pytest.raises(UnsupportedPipelineError, match=r"no flow model \(its sampling is NoiseSampling, EPS\)"):
        attach(patcher(pipe, NoiseSampling()), settings(), Points)
    with pytest.raises(UnsupportedPipelineError, match=r"no flow model \(its sampling is CleanSampling"):
        attach(patcher(pipe, CleanSampling()), settings(), Points)
    model = accelerated(pipe, tmp_path, MIXED)
    model.model.model_sampling = NoiseSampling()
    with pytest.raises(UnsupportedPipelineError, match="no flow model"):
        sampled(model)
    model = accelerated(pipe, tmp_path, MIXED)
    with pytest.raises(ScheduleError, match="10 entries, this run has 4 denoising steps"):
        sampled(model, sigmas=levels(4))
    model.model_options["transformer_options"]["easycache"] = object()
    with pytest.raises(ConfigError, match="easycache and DDiT accelerate both skip steps"):
        sampled(model)
    with pytest.raises(ConfigError, match="no report: connect the output of a 'DDiT accelerate' node"):
        attached(patcher(pipe))
    with pytest.raises(ScheduleError, match=r"schedule\[2\]=2 is not among multiples=1,4"):
        settings(schedule=fitted(tmp_path, COARSE), multiples="1,4")
    with pytest.raises(ScheduleError, match=r"schedule\[1\]=22: patches that span two latent frames .*--kinds 1,2,4,0"):
        settings(schedule=fitted(tmp_path, [1, 22, 0]))
    with pytest.raises(ConfigError, match="coarse='adapter'"):
        settings(coarse="adapter")
    with pytest.raises(ConfigError, match="multiples='one'"):
        settings(multiples="one")
    with pytest.raises(ConfigError, match="there is no such file"):
        settings(schedule="none.json")


def test_attaching_again_changes_the_settings_alone(pipe, tmp_path):
    model = accelerated(pipe, tmp_path, MIXED)
    again = attach(model, settings(speedup=2), Points)
    sampled(again)
    assert sizes(again).count(0) == 5 and attached(model).report is None
    assert {key: len(found) for keys in again.wrappers.values() for key, found in keys.items()} == {"ddit": 1}
    clone = again.clone()  # as a node for a LoRA makes one
    sampled(clone, z=noise(8, 8))
    assert attached(again).report is attached(clone).report and attached(again).report.steps[0].tokens == 16
    assert json.loads(attached(again).report.to_json())["complete"]
