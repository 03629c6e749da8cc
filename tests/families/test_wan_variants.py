"""What the variants of Wan carry beside the video, on coarse tokens."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from specimens import SPECIMENS

import ddit_rt
from ddit_rt import ConfigError
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.families.testing import run
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import PatchEmbedding, bands

SIGMA = 0.6


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_of(call, multiple):
    batch, channels, frames, height, width = call.latent.shape
    return noise(batch, channels, frames, height // multiple, width // multiple)


@pytest.mark.parametrize("multiple", [2, 4])
def test_the_clean_frame_is_pooled_as_it_is_and_told_no_noise(multiple):
    caught = first_call(SPECIMENS["wan-ti2v-image"])
    family, module, call = caught.family, caught.module, caught.call
    per_frame = call.geometry.tokens(1) // call.geometry.frames
    times = caught.arguments["timestep"]
    assert (times[:, :per_frame] == 0).all() and (times[:, per_frame:] == 1000 * caught.sigma).all()
    low = low_of(call, multiple)
    hidden = low.clone()
    hidden[:, :, 0] = bands.down(call.latent, multiple)[:, :, 0]
    times = torch.full((1, call.geometry.tokens(multiple)), 1000 * SIGMA)
    times[:, : per_frame // multiple**2] = 0
    with torch.no_grad():
        wanted = module(**{**caught.arguments, "hidden_states": hidden, "timestep": times})[0]
        found = family.run_low(module, module.forward, call, low, SIGMA, multiple, True)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        # through coarse patches, whose embedding takes means
        embedding = PatchEmbedding.of_means(family.projections(module), multiple)
        spread = bands.up(low, multiple)
        patches = family.run_patches(module, module.forward, call, spread, SIGMA, embedding, multiple, True)
    torch.testing.assert_close(bands.down(patches[:, :48], multiple), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan-ti2v", "wan-ti2v-image"])
def test_steps_with_a_timestep_per_token_are_placed_and_coarse(name):
    specimen = SPECIMENS[name]
    pipe = specimen.make()
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        video = run(pipe, specimen.arguments(guided=True))
        steps = ddit_rt.report(pipe).steps
    assert [step.multiple for step in steps] == specimen.schedule and not any(step.note for step in steps)
    assert [step.timestep for step in steps] == pipe.scheduler.timesteps.tolist()
    if name == "wan-ti2v-image":
        clean = first_call(specimen).call.latent[:, :, 0]
        torch.testing.assert_close(video[:, :, 0], clean)


def test_other_timesteps_per_token_run_full():
    caught = first_call(SPECIMENS["wan-ti2v-image"])
    family, module, given = caught.family, caught.module, caught.arguments
    rising = torch.linspace(0, 900, given["timestep"].shape[1])[None]
    with pytest.raises(NotCoarseError, match="several noise levels"):
        family.parse(module, {**given, "timestep": rising})
    with pytest.raises(NotCoarseError, match="in one frame"):
        family.parse(module, {**given, "timestep": given["timestep"].flip(1).roll(5, 1)})
    # samples may differ, as in training
    both = torch.cat([given["timestep"], given["timestep"] / 2])
    text = given["encoder_hidden_states"].expand(2, -1, -1)
    two = {"hidden_states": given["hidden_states"].expand(2, -1, -1, -1, -1), "encoder_hidden_states": text}
    call = family.parse(module, {**given, **two, "timestep": both})
    coarse = family.coarse_arguments(call, torch.tensor([0.5, 0.2]), 2)["timestep"]
    assert coarse[:, -1].tolist() == [500.0, 200.0] and (coarse[:, :8] == 0).all()


@pytest.mark.parametrize("name", ["wan-ti2v", "wan-vace", "wan-animate"])
def test_teacache_is_refused_where_nothing_is_published(name):
    pipe = SPECIMENS[name].make()
    with pytest.raises(ConfigError, match="no published coefficients"):
        ddit_rt.accelerate(pipe, cache=ddit_rt.TeaCacheConfig())
    assert "forward" not in pipe.transformer.__dict__


@pytest.mark.parametrize("prompts", [1, 2])
def test_first_and_last_picture_count_as_tokens_of_every_sample(prompts):
    specimen = SPECIMENS["wan-first-last"]
    given = specimen.arguments(guided=True)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given[name] = torch.cat([given[name], 2 * given[name]])[:prompts]
    pipe = specimen.make()
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    plain = run(pipe, dict(given, generator=torch.Generator().manual_seed(1)))
    handle.remove()
    assert seen[0]["encoder_hidden_states_image"].shape[:2] == (2 * prompts, 5)
    assert family_of(pipe).parse(pipe.transformer, seen[0]).text_tokens == 512 + 2 * 5
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        coarse = run(pipe, dict(given, generator=torch.Generator().manual_seed(1)))
        assert ddit_rt.report(pipe).schedule == specimen.schedule
    assert torch.isfinite(coarse).all() and not torch.equal(coarse, plain)


@pytest.mark.parametrize("multiple", [2, 4])
def test_vace_pools_its_control_latents_with_the_grid(multiple):
    caught = first_call(SPECIMENS["wan-vace"])
    family, module, call = caught.family, caught.module, caught.call
    assert family.name == "wan-vace"
    low, control = low_of(call, multiple), caught.arguments["control_hidden_states"]
    times = torch.full((1,), 1000 * SIGMA)
    small = {"hidden_states": low, "timestep": times, "control_hidden_states": bands.down(control, multiple)}
    with torch.no_grad():
        wanted = module(**{**caught.arguments, **small})[0]
        found = family.run_low(module, module.forward, call, low, SIGMA, multiple, True)
        uncontrolled = module(**{**caught.arguments, **small, "control_hidden_states_scale": torch.zeros(2)})[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, uncontrolled, rtol=1e-2, atol=1e-2)


def test_vaces_reference_pictures_are_frames_of_the_latent():
    specimen = SPECIMENS["wan-vace"]
    picture = Image.new("RGB", (40, 40), (200, 30, 10))
    pipe = specimen.make()
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule, coarse="band-split"):
        latents = run(pipe, specimen.arguments(guided=True) | {"reference_images": [picture]})
        steps = ddit_rt.report(pipe).steps
    assert latents.shape[2] == 3 and torch.isfinite(latents).all()
    assert [step.tokens for step in steps] == [3 * (4 // k) * (8 // k) if k else 0 for k in specimen.schedule]


def test_a_source_video_that_stays_smaller_than_asked_for_runs_full():
    caught = first_call(SPECIMENS["wan-vace"])
    control = caught.arguments["control_hidden_states"][..., :-2, :]
    with pytest.raises(NotCoarseError, match=r"\(6, 16\) for a latent of \(8, 16\)"):
        caught.family.parse(caught.module, {**caught.arguments, "control_hidden_states": control})


@pytest.mark.parametrize("multiple", [2, 4])
def test_animate_pools_its_poses_with_the_grid(multiple):
    caught = first_call(SPECIMENS["wan-animate"])
    family, module, call = caught.family, caught.module, caught.call
    assert family.name == "wan-animate" and call.text_tokens == 512 + 5
    low, pose = low_of(call, multiple), caught.arguments["pose_hidden_states"]
    assert pose.shape[2] == low.shape[2] - 1  # none for the character's picture
    hidden = torch.cat([low, bands.down(call.condition, multiple)], dim=1)
    times = torch.full((1,), 1000 * SIGMA)
    small = {"hidden_states": hidden, "timestep": times, "pose_hidden_states": bands.down(pose, multiple)}
    with torch.no_grad():
        wanted = module(**{**caught.arguments, **small})[0]
        found = family.run_low(module, module.forward, call, low, SIGMA, multiple, True)
        still = module(**{**caught.arguments, **small, "pose_hidden_states": 0 * small["pose_hidden_states"]})[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, still, rtol=1e-2, atol=1e-2)


def test_animates_segments_are_runs_of_their_own():
    specimen = SPECIMENS["wan-animate"]
    pipe = specimen.make()

    def arguments():
        given = specimen.arguments(height=64, width=64)
        return given | {name: given[name] + given[name][:4] for name in ("pose_video", "face_video")}

    plain = run(pipe, arguments())
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, arguments()), plain)
    seen = []

    def step(pipe, index, timestep, tensors):
        report = ddit_rt.report(pipe)
        seen.append((index, len(report.steps), report.complete))
        return {}

    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        for _ in range(2):
            coarse = run(pipe, arguments() | {"callback_on_step_end": step})
            report = ddit_rt.report(pipe)
            assert report.complete and report.schedule == specimen.schedule
    one_segment = [(index, index + 1, index == 7) for index in range(8)]
    assert seen == 4 * one_segment
    assert torch.isfinite(coarse).all() and not torch.equal(coarse, plain)
