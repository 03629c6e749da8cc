"""Patches that span two latent frames, on Wan."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from specimens.wan import SPECIMENS
from tiny import wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError, ScheduleError
from ddit_rt.families import family_of
from ddit_rt.families.testing.coarse import assert_close, counted_flops
from ddit_rt.families.testing.specimen import Caught, first_call
from ddit_rt.granularity import PatchEmbedding, bands, pad_to_grid
from ddit_rt.multiples import TEMPORAL_MULTIPLES, frames_of, noise_shrink, side_of
from ddit_rt.pipeline import accelerated

WAN = next(specimen for specimen in SPECIMENS if specimen.name == "wan")


def caught(frames: int, height: int = 64, width: int = 96) -> Caught:
    """The first call of a clip with so many latent frames."""
    return first_call(WAN, frames=4 * frames - 3, height=height, width=width)


@pytest.mark.parametrize("multiple", TEMPORAL_MULTIPLES)
@pytest.mark.parametrize("frames", [4, 5])
def test_a_coarse_run_is_the_model_s_own_run_on_a_smaller_and_shorter_clip(multiple: int, frames: int) -> None:
    full = caught(frames)
    small = caught(-(-frames // frames_of(multiple)), 64 // side_of(multiple), 96 // side_of(multiple))
    with torch.no_grad():
        wanted = small.module(**small.arguments)[0]
    latent = small.call.latent.float()
    found = full.family.run_low(full.module, full.module.forward, full.call, latent, small.sigma, multiple, True)
    assert_close(found, wanted, 1e-4, str(multiple))


@pytest.mark.parametrize("multiple", TEMPORAL_MULTIPLES)
def test_pi_resized_ends_see_the_mean_of_the_frames(multiple: int) -> None:
    """On a latent that is the same in both frames of a patch, and a bilinear upsampling in space at 21 alone."""
    full = caught(4)
    family, module, call = full.family, full.module, full.call
    embedding = family.patch_embedding(module, multiple)
    low = bands.down(call.latent.float(), 21)
    latent = bands.up(low, 21)
    found = family.run_patches(module, module.forward, call, latent, 0.5, embedding, multiple, True)
    assert found.shape == latent.shape
    torch.testing.assert_close(found, bands.up(bands.down(found, 21), 21))
    if multiple == 21:
        assert_close(found, bands.up(family.run_low(module, module.forward, call, low, 0.5, 21, True), 21), 1e-4, "21")


def test_positions_are_the_centres_of_the_frames() -> None:
    full = caught(4)
    family, module, call = full.family, full.module, full.call
    low = bands.down(call.latent.float(), 21)
    run = partial(family.run_low, module, module.forward, call, low, 0.5, 21)
    assert not torch.allclose(run(True), run(False), atol=1e-4)
    rope = family.centred_rope(module, call.geometry, 1, torch.device("cpu"))
    own = module.rope(call.latent)
    for made, theirs in zip(rope, own, strict=True):
        torch.testing.assert_close(made.to(theirs.dtype).view(theirs.shape), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("multiple", TEMPORAL_MULTIPLES)
@pytest.mark.parametrize("frames", [4, 5])
def test_cost_and_tokens(multiple: int, frames: int) -> None:
    full = caught(frames)
    family, module, call = full.family, full.module, full.call
    low = bands.means(call.latent.float(), call.geometry, multiple)
    run = partial(family.run_low, module, module.forward, call, low, 0.5, multiple, True)
    found = call.latent.shape[0] * family.flops(module, call.geometry, multiple, call.text_tokens)
    assert math.isclose(found, counted_flops(run), rel_tol=0.05)
    assert call.geometry.tokens(multiple) == low.shape[2] * low.shape[3] * low.shape[4] // 4


@pytest.mark.parametrize("multiple", TEMPORAL_MULTIPLES)
def test_the_split_is_exact_and_orthogonal(multiple: int) -> None:
    geometry = caught(5).call.geometry
    latent = torch.randn(2, 4, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    padded = pad_to_grid(latent, geometry, multiple)
    assert padded.shape[2] == 6 and torch.equal(padded[:, :, 5], latent[:, :, 4])
    low, high = bands.up(bands.down(padded, multiple), multiple), bands.high_band(padded, multiple)
    torch.testing.assert_close(low + high, padded)
    torch.testing.assert_close(bands.down(high, multiple), torch.zeros_like(bands.down(high, multiple)))
    assert torch.equal(bands.crop_to_latent(padded, geometry), latent)


@pytest.mark.parametrize("multiple", TEMPORAL_MULTIPLES)
def test_the_low_band_is_a_flow_state_of_its_own(multiple: int) -> None:
    """The mean's noise has standard deviation 1/√n; at σ' the low state has noise and signal in shares that add up."""
    noise = torch.randn(1, 4, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    assert math.isclose(float(bands.down(noise, multiple).std()), 1 / noise_shrink(multiple), rel_tol=0.02)
    sigma, clean = 0.7, torch.full_like(noise, 0.3)
    low, level = bands.low_state((1 - sigma) * clean + sigma * noise, sigma, multiple)
    unit = bands.down(noise, multiple) * noise_shrink(multiple)
    torch.testing.assert_close(low, (1 - level) * bands.down(clean, multiple) + level * unit)
    velocity = bands.low_velocity(low, level, unit - bands.down(clean, multiple), multiple)
    torch.testing.assert_close(velocity, bands.down(noise - clean, multiple))


@pytest.mark.parametrize("multiple", TEMPORAL_MULTIPLES)
def test_a_run_at_one_multiple_on_a_band_limited_latent_is_the_shorter_clip_s_run(multiple: int) -> None:
    """All steps coarse from an upsampled latent: the low band takes the Euler steps of the small clip, between σ'."""
    steps = 6
    small = caught(2, 64 // side_of(multiple), 96 // side_of(multiple))
    noise = torch.randn(small.call.latent.shape[1:], generator=torch.Generator().manual_seed(5))[None]

    def run(scale: float, latents: torch.Tensor, frames: int, height: int, width: int, **settings) -> torch.Tensor:
        pipe = wan()
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        given = wan_inputs(frames=4 * frames - 3, height=height, width=width, steps=steps, guidance_scale=1.0)
        sigmas = torch.linspace(1, 0.1, steps)
        levels = sigmas / scale / ((1 - sigmas) + sigmas / scale)
        inner = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda count, device=None: inner(sigmas=levels.tolist(), device=device)
        with accelerated(pipe, **settings):
            return pipe(**{**given, "latents": latents}).frames

    shrink = noise_shrink(multiple)
    wanted = run(shrink, noise, 2, 64 // side_of(multiple), 96 // side_of(multiple), threshold=0)
    settings = {"multiples": (1, multiple), "schedule": [multiple] * steps, "coarse": "band-split", "corrector": False}
    found = run(1.0, bands.up(noise, multiple) / shrink, 4, 64, 96, **settings)
    assert_close(found, bands.up(wanted, multiple), 2e-3, str(multiple))


def test_a_schedule_with_all_kinds_of_steps_runs_and_is_reported() -> None:
    pipe = ddit_rt.accelerate(wan(), multiples=(1, 2, 4, (2, 1), (2, 2)), schedule=[1, 1, (2, 1), (2, 2), 1, 2, 0, 1])
    assert torch.isfinite(pipe(**wan_inputs(frames=13)).frames).all()
    report = ddit_rt.report(pipe)
    assert report.schedule == [1, 1, 21, 22, 1, 2, 0, 1]
    # 4 frames of 4 x 6 tokens
    assert [step.tokens for step in report.steps] == [96, 96, 48, 12, 96, 24, 0, 96]
    assert report.summary()["sizes"] == {"p": 4, "2p": 1, "4p": 0, "2f": 1, "2f2p": 1, "skipped": 1}
    assert "2f2p" in str(report)


@pytest.mark.parametrize("coarse", ["delta", "band-split", "naive"])
def test_every_untrained_path_spans_frames(coarse: str) -> None:
    pipe = wan()
    plain = pipe(**wan_inputs(frames=17)).frames
    schedule = [1, 1, 21, 1, 22, 1, 1, 1]
    with accelerated(pipe, multiples=(1, 21, 22), schedule=schedule, coarse=coarse):
        made = pipe(**wan_inputs(frames=17)).frames
        assert ddit_rt.report(pipe).schedule == schedule
    assert made.shape == plain.shape and not torch.equal(made, plain)
    assert torch.equal(pipe(**wan_inputs(frames=17)).frames, plain)


def test_the_threshold_rule_measures_pairs_of_frames() -> None:
    pipe = ddit_rt.accelerate(wan(), multiples=(1, 2, 21, 22), threshold=1e9, max_consecutive_coarse=None)
    pipe(**wan_inputs(frames=13))
    report = ddit_rt.report(pipe)
    measured = report.steps[-1].patch_std
    assert list(measured) == [1, 2, 21, 22] and all(value > 0 for value in measured.values())
    # everything is smooth enough, and 22 the coarsest
    assert report.schedule == [1, 1, 1, 22, 22, 22, 22, 22]


def test_the_std_over_two_frames_is_that_of_their_values() -> None:
    from ddit_rt.schedule import LatentEvolution

    increments = torch.randn(3, 1, 4, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    evolution = LatentEvolution(3, (1, 21), 0.5, "torch", 1e-3)
    for increment in increments:
        evolution.end_step(increment, 2, None)
    evolution.begin_step()
    third = increments[2] - 2 * increments[1] + increments[0]
    padded = torch.cat([third, third[:, :, -1:]], dim=2)
    patches = padded.view(1, 4, 3, 2, 4, 2, 6, 2).permute(0, 2, 4, 6, 1, 3, 5, 7)
    values = patches.flatten(4).std(-1, correction=0)
    found = evolution.current.wait()[21]
    assert math.isclose(found, float(values.quantile(0.5)), rel_tol=1e-5)


@pytest.mark.parametrize("name", ["wan-image", "wan-ti2v-image"])
def test_given_frames_never_share_a_patch_with_made_ones(name: str) -> None:
    specimen = next(s for s in SPECIMENS if s.name == name)
    pipe = specimen.make()
    with accelerated(pipe, multiples=(1, 2, 21, 22), schedule=[1, 1, 21, 22, 1, 22, 1, 1]):
        pipe(**specimen.arguments())
        steps = ddit_rt.report(pipe).steps
    assert [step.multiple for step in steps] == [1, 1, 1, 2, 1, 2, 1, 1]
    assert all("share a patch" in steps[i].note for i in (2, 3, 5))


def test_a_single_frame_has_none_beside_it() -> None:
    pipe = wan()
    with accelerated(pipe, multiples=(1, 2, 22), schedule=[1, 1, 22, 1, 1, 1, 1, 1]):
        pipe(**wan_inputs(frames=1))
        assert ddit_rt.report(pipe).steps[2].multiple == 2


def test_models_of_pictures_refuse_them() -> None:
    from tiny import flux

    with pytest.raises(ConfigError, match="can work with"):
        ddit_rt.accelerate(flux(), multiples=(1, 21))
    with pytest.raises(ConfigError, match="span two latent frames"):
        ddit_rt.DDiTConfig(multiples=(1, (3, 1)))
    with pytest.raises(ScheduleError, match="not among"):
        ddit_rt.DDiTConfig(multiples=(1, 2, 4), schedule=[1, (2, 2)])
    with pytest.raises(ScheduleError, match="can work with"):
        ddit_rt.accelerate(flux(), schedule=[1, 1, (2, 2)])


def test_a_schedule_brings_the_sizes_that_it_names() -> None:
    assert ddit_rt.DDiTConfig(schedule=[1, (2, 2), 4, 21]).multiples == (1, 21, 2, 22, 4)
    assert ddit_rt.DDiTConfig(schedule=[1, 2]).multiples == (1, 2, 4)
    fitted = ddit_rt.FittedSchedule([1, 22], 2.0, 30.0, 1)
    assert ddit_rt.DDiTConfig(schedule=fitted).multiples == (1, 2, 22, 4)


def test_settings_files_keep_them(tmp_path) -> None:
    config = ddit_rt.DDiTConfig(multiples=(1, 2, (2, 2)), schedule=(1, 2, (2, 2)))
    assert config.multiples == (1, 2, 22) and config.schedule == (1, 2, 22)
    assert ddit_rt.DDiTConfig.load(config.save(tmp_path / "settings.yaml")) == config


def test_ends_over_two_frames_are_those_of_their_mean() -> None:
    pipe = wan()
    ends = family_of(pipe).projections(pipe.transformer)
    embedding = PatchEmbedding.from_base(ends, 21)
    single = PatchEmbedding.from_base(ends, 1)
    patches = torch.randn(1, 3, 4, 2, 4, generator=torch.Generator().manual_seed(0))  # channels, frames, pixels
    torch.testing.assert_close(embedding.tokens(patches.flatten(2)), single.tokens(patches.mean(3).flatten(2)))
    tokens = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(1))
    twice = embedding.patches(tokens).unflatten(2, (4, 2, 4))
    for frame in (0, 1):
        torch.testing.assert_close(twice[:, :, :, frame], single.patches(tokens).unflatten(2, (4, 4)))


def test_fits_may_span_frames() -> None:
    call = wan_inputs(frames=13)
    prompt = {name: call.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    for name in ("generator", "output_type"):
        del call[name]
    found = ddit_rt.fit(WAN.make(), [prompt], speedup=1.5, kinds=(1, 21, 22), keep=False, **call)
    assert {21, 22} & set(found.schedule) and found.speedup >= 1.45
