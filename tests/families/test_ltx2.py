"""What only LTX-2 has: a sound that rides along with its own scheduler, and given frames."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from adapters import fresh
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline, LTX2VideoTransformer3DModel
from specimens import SPECIMENS, ltx2

import ddit_rt
from ddit_rt import FittedSchedule
from ddit_rt.families import NotCoarseError, family_of, fresh_adapter
from ddit_rt.families.ltx2 import LTX2
from ddit_rt.families.testing import counted_flops
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Geometry, PatchEmbedding, bands
from ddit_rt.pipeline.call_state import CallState
from ddit_rt.trajectories import record_trajectory

KINDS = ["ltx2", "ltx2-all-guidance", "ltx2-image"]


def both(pipe, arguments):
    """Video and sound, latents."""
    result = pipe(**arguments)
    return result.frames, result.audio


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_left_out_are_those_that_the_model_can_work_with():
    pipe = SPECIMENS["ltx2"].make()
    for settings in ({}, {"threshold": 1e9}, {"config": ddit_rt.DDiTConfig(threshold=1e9)}):
        with ddit_rt.accelerated(pipe, **settings):
            pipe(**SPECIMENS["ltx2"].arguments())
            report = ddit_rt.report(pipe)
        assert tuple(report.config["multiples"]) == (1, 2)
        assert max(report.schedule) == (2 if settings else 1)
        assert all(set(step.patch_std) <= {1, 2} for step in report.steps)


def test_warm_up_runs_those_sizes():
    pipe, call = SPECIMENS["ltx2"].make(), SPECIMENS["ltx2"].arguments()
    own = {"height", "width", "num_frames", "num_inference_steps", "generator", "output_type"}
    more = {name: value for name, value in call.items() if name not in own}
    with ddit_rt.accelerated(pipe, threshold=1e-3):
        report = ddit_rt.warmup(pipe, 256, 256, ltx2.FRAMES, progress=False, **more)
    assert set(report.schedule) == {1, 2} and all(set(step.patch_std) <= {1, 2} for step in report.steps)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"multiples": (1, 2, 4)},
            ddit_rt.ConfigError,
            r"\(1, 2, 4\).*LTX2Pipeline.*pass multiples=\(1, 2\)",
        ),
        ({"multiples": (1, 4)}, ddit_rt.ConfigError, r"pass multiples=\(1,\)"),
        ({"schedule": [1, 1, 2, 4, 1, 1, 1, 1]}, ddit_rt.ScheduleError, r"schedule\[3\]=4.*LTX2Pipeline"),
        ({"schedule": FittedSchedule([1, 4], 2.0, 40.0, 1)}, ddit_rt.ScheduleError, r"schedule\[1\]=4.*LTX2Pipeline"),
    ],
)
def test_other_sizes_are_refused_by_name_and_nothing_is_changed(settings, error, match):
    pipe = SPECIMENS["ltx2"].make()
    with pytest.raises(error, match=match):
        ddit_rt.accelerate(pipe, **settings)
    assert "forward" not in vars(pipe.transformer)
    with ddit_rt.accelerated(pipe, threshold=1e9):
        pipe(**SPECIMENS["ltx2"].arguments())
        kept = ddit_rt.report(pipe).schedule
        with pytest.raises(error):
            ddit_rt.accelerate(pipe, **settings)
        pipe(**SPECIMENS["ltx2"].arguments())
        assert ddit_rt.report(pipe).schedule == kept


def test_fits_and_adapters_of_other_sizes_are_refused():
    pipe = SPECIMENS["ltx2"].make()
    with pytest.raises(ddit_rt.ConfigError, match=r"4 is none of \(1, 2\)"):
        ddit_rt.fit(pipe, ["a"], speedup=2.0, kinds=(1, 4, 0))
    with pytest.raises(ddit_rt.ConfigError, match=r"multiples=\(2, 4\).*ltx2"):
        fresh_adapter(LTX2(), pipe.transformer, multiples=(2, 4), rank=2)
    assert fresh_adapter(LTX2(), pipe.transformer, rank=2).spec.multiples == (2,)


# -- the sound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_sound_of_full_steps_is_the_plain_one(kind):
    specimen = SPECIMENS[kind]
    pipe = specimen.make()
    plain = both(pipe, specimen.arguments(guided=True))
    with ddit_rt.accelerated(pipe, threshold=0):
        found = both(pipe, specimen.arguments(guided=True))
    again = both(pipe, specimen.arguments(guided=True))
    assert all(map(torch.equal, found, plain)) and all(map(torch.equal, again, plain))


class Watched:
    """A call without guidance: what every model run predicted of the sound, and what its scheduler was given."""

    def __init__(self, monkeypatch, **settings):
        pipe = ltx2.make()
        self.runs: list[tuple[int, torch.Tensor]] = []
        self.steps: list[torch.Tensor] = []
        own, own_step = pipe.transformer.forward, FlowMatchEulerDiscreteScheduler.step

        def forward(**kwargs):
            raw = own(**kwargs)
            self.runs.append((kwargs["hidden_states"].shape[1], raw[1].float()))
            return raw

        def step(scheduler, output, *args, **kwargs):
            if output.shape[1] == ltx2.SOUND:
                self.steps.append(output)
            return own_step(scheduler, output, *args, **kwargs)

        pipe.transformer.forward = forward
        monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step)
        with ddit_rt.accelerated(pipe, **settings):
            self.sound = both(pipe, SPECIMENS["ltx2"].arguments())[1]
            self.report = ddit_rt.report(pipe)


@pytest.mark.parametrize("coarse", ["band-split", "delta", "naive"])
def test_the_sound_of_a_coarse_step_is_that_of_its_own_run(monkeypatch, coarse):
    watched = Watched(monkeypatch, schedule=[1, 1, 2, 1, 1, 1, 1, 1], coarse=coarse)
    runs = watched.runs[: len(watched.runs) - 5]  # up to the coarse step, what delta looks up before included
    assert [tokens for tokens, _ in runs] == ([128, 128, 32, 32, 32] if coarse == "delta" else [128, 128, 32])
    torch.testing.assert_close(watched.steps[2], runs[-1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"schedule": [1, 1, 0, 1, 1, 1, 1, 1]}, {"coarse": "extrapolate"}])
def test_the_sound_of_a_skipped_step_is_on_the_line_through_its_last_predictions(monkeypatch, settings):
    watched = Watched(monkeypatch, **{"schedule": [1, 1, 2, 1, 1, 1, 1, 1], **settings})
    (_, older), (_, newest) = watched.runs[:2]
    levels = [step.sigma for step in watched.report.steps[:3]]
    share = min((levels[2] - levels[1]) / (levels[1] - levels[0]), 1.0)
    torch.testing.assert_close(watched.steps[2], newest + share * (newest - older), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(watched.steps[3], watched.runs[2][1], rtol=1e-4, atol=1e-4)


def test_what_was_foretold_of_the_sound_is_corrected_too():
    def calm():
        pipe = ltx2.make()
        with torch.no_grad():  # as smooth as a trained model
            for name, layer in pipe.transformer.named_modules():
                if name.endswith("linear") and "time_embed" in name:
                    layer.weight.mul_(0.2)
            pipe.transformer.audio_proj_out.weight.mul_(0.1)
            pipe.transformer.proj_out.weight.mul_(0.1)
        return pipe

    arguments = {"steps": 24}
    plain = both(calm(), SPECIMENS["ltx2"].arguments(**arguments))
    errors = []
    for corrector in (False, True):
        with ddit_rt.accelerated(calm(), schedule=[1, 1, *[1, 0, 0] * 7, 1], corrector=corrector) as pipe:
            found = both(pipe, SPECIMENS["ltx2"].arguments(**arguments))
        errors.append([float((a - b).square().mean().sqrt()) for a, b in zip(found, plain, strict=True)])
    (video, sound), (video_corrected, sound_corrected) = errors
    assert video_corrected < 0.7 * video and sound_corrected < 0.9 * sound, errors


def test_moved_noise_levels_reach_both_schedulers(monkeypatch):
    """Video and sound are told one noise level; their schedulers have to step between the same."""
    seen = []
    own_step = FlowMatchEulerDiscreteScheduler.step

    def step(scheduler, output, timestep, *args, **kwargs):
        seen.append((float(timestep), scheduler.sigmas.tolist()))
        return own_step(scheduler, output, timestep, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step)
    pipe = ltx2.make()
    ddit_rt.accelerate(pipe, threshold=0)
    own_init = CallState.__init__

    def init(state, *args, **kwargs):
        own_init(state, *args, **kwargs)
        chosen = state.policy
        state.policy = SimpleNamespace(
            start=chosen.start, choose=chosen.choose, place=lambda given: [level**2 for level in given]
        )

    monkeypatch.setattr(CallState, "__init__", init)
    assert all(torch.isfinite(part).all() for part in both(pipe, SPECIMENS["ltx2"].arguments()))
    ddit_rt.restore(pipe)
    assert len(seen) == 16 and all(levels == seen[0][1] for _, levels in seen)
    plain = []
    monkeypatch.setattr(
        FlowMatchEulerDiscreteScheduler,
        "step",
        lambda s, *a, **k: plain.append(s.sigmas.tolist()) or own_step(s, *a, **k),
    )
    both(ltx2.make(), SPECIMENS["ltx2"].arguments())
    assert seen[0][1] == pytest.approx([level**2 for level in plain[0]], rel=1e-5)


def test_a_loop_of_ones_own_runs_full():
    """Who steps the sound there cannot be known."""
    caught = first_call(SPECIMENS["ltx2"])
    pipe = ddit_rt.accelerate(caught.pipe, schedule=[1, 2, 0, 1])
    pipe.scheduler.set_timesteps(4, mu=1.0)
    latents = caught.arguments["hidden_states"]
    for timestep in pipe.scheduler.timesteps:
        times = {name: timestep.expand(1) for name in ("timestep", "sigma")}
        video, sound = pipe.transformer(**{**caught.arguments, "hidden_states": latents, **times})
        assert sound.shape == caught.arguments["audio_hidden_states"].shape
        latents = pipe.scheduler.step(video, timestep, latents, return_dict=False)[0]
    report = ddit_rt.report(pipe)
    assert report.schedule == [1] * 4 and all("audio_scheduler" in step.note for step in report.steps)
    ddit_rt.restore(pipe)


def test_no_schedule_is_fitted_that_would_leave_out_the_sound():
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="its transformer makes two"):
        record_trajectory(ltx2.make(), 0, **SPECIMENS["ltx2"].arguments())


# -- positions and given frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(256, 256), (288, 160)])
def test_positions_of_coarse_tokens(size):
    caught = first_call(SPECIMENS["ltx2"], height=size[0], width=size[1])
    module, call = caught.module, caught.call
    rows, columns = call.geometry.grid(2)
    low = torch.zeros(1, 4, 2, rows, columns)
    own = module.rope.prepare_video_coords(1, 2, rows, columns, torch.device("cpu"))
    native = caught.family.low_arguments(call, low, 0.5, 2, True)
    assert torch.equal(native["video_coords"], own) and (native["height"], native["width"]) == (rows, columns)
    centres = caught.family.low_arguments(call, low, 0.5, 2, False)["video_coords"].unflatten(2, (2, rows, columns))
    full = call.arguments["video_coords"].unflatten(2, (2, *call.geometry.grid(1)))
    assert torch.equal(centres[:, :, :, 1, 1, 0], full[:, :, :, 2, 2, 0])  # from the third full patch
    assert torch.equal(centres[:, 1:, :, 1, 1, 1], full[:, 1:, :, 3, 3, 1])  # to the end of the fourth
    assert torch.equal(centres[:, 0], full[:, 0, :, :rows, :columns])  # time stays


def test_the_sound_keeps_its_noise_level_in_a_coarse_run():
    caught = first_call(SPECIMENS["ltx2"])
    given = caught.family.low_arguments(caught.call, torch.zeros(1, 4, 2, 4, 4), 0.25, 2, True)
    assert given["timestep"].tolist() == given["sigma"].tolist() == [250.0]
    assert given["audio_timestep"].tolist() == given["audio_sigma"].tolist() == caught.arguments["sigma"].tolist()


def test_a_given_frame_is_seen_as_it_is_at_any_size():
    caught = first_call(SPECIMENS["ltx2-image"])
    family, module, call = caught.family, caught.module, caught.call
    sigma = caught.sigma
    low, level = bands.low_state(call.latent.float(), sigma, 2)
    given = family.low_arguments(call, low, level, 2, True)
    tokens = given["hidden_states"].unflatten(1, (2, 4, 4)).movedim(-1, 1)
    torch.testing.assert_close(tokens[:, :, :1], bands.down(call.latent, 2)[:, :, :1])
    torch.testing.assert_close(tokens[:, :, 1:], low[:, :, 1:])
    times = given["timestep"].unflatten(1, (2, 16))
    assert (times[:, 0] == 0).all() and torch.allclose(times[:, 1], torch.tensor(1000 * float(level)))
    # and the split makes of its prediction what the model predicts
    own = module(**given)[0].unflatten(1, (2, 4, 4)).movedim(-1, 1)
    made = family.run_low(module, module.forward, call, low, level, 2, True)
    split = bands.low_velocity(low, level, made, 2)
    torch.testing.assert_close(split[:, :, :1], own[:, :, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[:, :, 1:], own[:, :, 1:])


def test_an_adapter_reads_a_given_frame_as_it_is(monkeypatch):
    specimen, seen = SPECIMENS["ltx2-image"], []
    own_read = PatchEmbedding.read
    monkeypatch.setattr(PatchEmbedding, "read", lambda self, pixels: seen.append(pixels) or own_read(self, pixels))
    pipe = specimen.make()
    plain = both(pipe, specimen.arguments())[0]
    settings = {"schedule": specimen.schedule, "corrector": False}
    with ddit_rt.accelerated(pipe, coarse="band-split", **settings):
        split = both(pipe, specimen.arguments())
    with ddit_rt.accelerated(pipe, adapter=fresh(pipe, multiples=(2,)), multiples=(1, 2), **settings):
        found = both(pipe, specimen.arguments())
    assert seen and all(torch.allclose(pixels[:, :4, 0], plain[:, :, 0], atol=1e-5) for pixels in seen)
    for one, other in zip(found, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", [torch.tensor(0.6), torch.tensor([0.6])])
def test_what_an_adapter_makes_of_a_given_frame_comes_through_the_split(sigma, monkeypatch):
    caught = first_call(SPECIMENS["ltx2-image"])
    family, module, call = caught.family, caught.module, caught.call
    written, ends = [], fresh(caught.pipe, multiples=(2,)).size(2).embedding
    own_write = ends.write
    monkeypatch.setattr(ends, "write", lambda *given: written.append(own_write(*given)) or written[-1], raising=False)
    latent = torch.randn(1, ends.embed.shape[1] // 4, 2, 8, 8)
    made = family.run_patches(module, module.forward, call, latent, sigma, ends, 2, True)
    low, level = bands.down(latent[:, :4], 2), sigma.view(-1, 1, 1, 1, 1)
    split = bands.low_velocity(low, level, bands.down(made[:, :4], 2), 2)
    torch.testing.assert_close(split[:, :, :1], bands.down(written[0][:, :4, :1], 2), rtol=1e-4, atol=1e-5)
    assert torch.equal(made[:, :, 1:], written[0][:, :, 1:]) and torch.equal(made[:, 4:], written[0][:, 4:])


def test_a_given_frame_stays_as_it_is():
    specimen = SPECIMENS["ltx2-image"]
    pipe = specimen.make()
    plain = both(pipe, specimen.arguments())[0]
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        found = both(pipe, specimen.arguments())[0]
    assert isinstance(pipe, LTX2ImageToVideoPipeline)
    assert torch.equal(found[:, :, :1], plain[:, :, :1]) and not torch.equal(found, plain)


@pytest.mark.parametrize("name", ["video_self_attention_mask", "video_keyframes_mask"])
def test_what_coarse_tokens_cannot_carry_runs_full(name):
    caught = first_call(SPECIMENS["ltx2"])
    with pytest.raises(NotCoarseError, match=name):
        caught.family.parse(caught.module, {**caught.arguments, name: torch.ones(1)})
    more = torch.cat([caught.arguments["hidden_states"]] * 2, dim=1)
    with pytest.raises(NotCoarseError, match="256 tokens are no plain grid of 2 x 8 x 8"):
        caught.family.parse(caught.module, {**caught.arguments, "hidden_states": more})


def test_patches_of_more_than_a_pixel_are_refused():
    pipe = ltx2.make()
    pipe.transformer.register_to_config(patch_size=2)
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="1 x 2 x 2"):
        family_of(pipe)


# -- cost -------------------------------------------------------------------------------------------------------------

NEWER = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}


@pytest.mark.parametrize("config", [{}, NEWER], ids=["2.0", "2.3"])
def test_flops_of_the_published_sizes(config):
    """Of 4 in 48 layers, which cost the same: counting all of them takes a minute."""
    with torch.device("meta"):
        module = LTX2VideoTransformer3DModel(**config, num_layers=4)
        geometry = Geometry(128, 16, 16, 24, 1)  # 121 frames of 512 x 768
        for multiple in (1, 2):
            rows, columns = geometry.grid(multiple)
            tokens, text = geometry.tokens(multiple), 1024
            width = module.config.caption_channels if not config else 4096
            arguments = {
                "hidden_states": torch.empty(1, tokens, 128),
                "audio_hidden_states": torch.empty(1, 126, 128),
                "encoder_hidden_states": torch.empty(1, text, width),
                "audio_encoder_hidden_states": torch.empty(1, text, width if not config else 2048),
                "timestep": torch.empty(1),
                "sigma": torch.empty(1),
                "num_frames": 16,
                "height": rows,
                "width": columns,
                "audio_num_frames": 126,
            }
            counted = counted_flops(lambda a=arguments: module(**a))
            assert LTX2().flops(module, geometry, multiple, text) == pytest.approx(counted, rel=2e-3)
