"""`accelerate(pipe, speedup=...)`: what users ask for is what runs, in every family, and nothing is left behind."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
)
from schedulers import FLOW
from tiny import flux, flux_inputs, latents_of, negative, picture, smooth, wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError, DDiTConfig, ScheduleError
from ddit_rt.pipeline import configured
from ddit_rt.schedule import WARP, FittedSchedule, TargetPolicy, evaluation_steps, moved_levels, place_evaluations

STEPS = 24


def run(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, **settings):
        return latents_of(pipe, inputs), ddit_rt.report(pipe)


def error(a, b):
    return float((a - b).square().mean())


# -- what is asked for ----------------------------------------------------------------------------------------------


def test_accelerate_alone_aims_at_the_documented_target():
    _, report = run(flux(), flux_inputs(steps=STEPS))
    assert report.speedup_estimate == pytest.approx(2.0) and report.complete
    assert report.schedule == [1 if i in evaluation_steps(STEPS, 12, WARP["plain"]) else 0 for i in range(STEPS)]
    assert report.config["speedup"] == 2.0


@pytest.mark.parametrize("steps", [4, 8, 10])
def test_few_step_models_keep_their_steps_unless_asked(steps):
    pipe, inputs = flux(), flux_inputs(steps=steps)
    plain = latents_of(pipe, inputs)
    latents, report = run(pipe, inputs)
    assert torch.equal(latents, plain) and report.schedule == [1] * steps
    assert 0 in run(pipe, inputs, speedup=2.0)[1].schedule


@pytest.mark.parametrize("reference", ["plain", "converged"])
@pytest.mark.parametrize("speedup", [1.5, 2.5, 3, 4, 6])
def test_a_target_is_reached(speedup, reference):
    _, report = run(flux(), negative(flux_inputs(steps=STEPS)), speedup=speedup, reference=reference)
    assert speedup <= report.speedup_estimate < speedup * 1.35
    assert report.schedule[:1] == [1] and {step.executed for step in report.steps} == {"eager", "cached"}


@pytest.mark.parametrize(
    ("settings", "steered"),
    [
        ({}, True),
        ({"cuda_graphs": "auto", "corrector": False}, True),
        ({"threshold": 1e-3}, False),
        ({"multiples": (1,)}, False),
        ({"order": 2}, False),
        ({"coarse": "delta"}, False),
        ({"speedup": 3, "order": 2}, True),
        ({"speedup": None}, False),
        ({"quality": 40}, False),
        ({"schedule": [1, 1]}, False),
    ],
)
def test_settings_of_the_threshold_rule_ask_for_it(settings, steered):
    config = DDiTConfig(**settings)
    assert (config.speedup is not None) is steered
    assert config.chosen_target is any(settings.get(name) is not None for name in ("speedup", "quality"))
    assert DDiTConfig(backend="torch").replace(**settings).speedup == config.speedup


def test_more_quality_takes_more_evaluations_whatever_the_steps():
    counts = {}
    for steps in (20, 40):
        for quality in (30, 40, 50, 500):
            report = run(flux(), flux_inputs(steps=steps), quality=quality)[1]
            counts[steps, quality] = report.schedule.count(1)
    assert counts[40, 30] == counts[20, 30] < counts[40, 40] == counts[20, 40] < counts[40, 50] < 40
    assert counts[40, 500] == 40 and counts[20, 500] == 20


# -- how near it stays ----------------------------------------------------------------------------------------------


SMOOTH = {
    "flux": lambda steps: (smooth(flux()), negative(flux_inputs(steps=steps))),
}


@pytest.mark.parametrize("model", SMOOTH)
def test_the_corrector_brings_a_run_nearer_to_plain(model):
    pipe, inputs = SMOOTH[model](60)
    plain = latents_of(pipe, inputs)
    with_it, without = (run(pipe, inputs, speedup=2, corrector=corrector)[0] for corrector in (True, False))
    assert error(with_it, plain) < error(without, plain)


def test_guidance_and_batches_go_the_same_way():
    pipe = smooth(flux())
    both = negative(
        flux_inputs(batch=2, steps=STEPS, latents=torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2)))
    )
    together, _ = run(pipe, both, speedup=3)
    for i in range(2):
        alone = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in both.items()}
        torch.testing.assert_close(run(pipe, alone, speedup=3)[0], together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_bfloat16_runs():
    latents, report = run(flux(dtype=torch.bfloat16), flux_inputs(steps=STEPS, dtype=torch.bfloat16), speedup=3)
    assert latents.dtype == torch.bfloat16 and bool(torch.isfinite(latents).all()) and report.complete


def test_two_transformers_each_begin_with_full_steps():
    pipe = wan(two=True, euler=True)
    _, report = run(pipe, wan_inputs(steps=STEPS), speedup=3)
    boundary = next(i for i, step in enumerate(report.steps) if step.timestep < 600)
    assert report.schedule[boundary] == 1 and 0 in report.schedule[:boundary] and 0 in report.schedule[boundary:]


# -- noise levels ---------------------------------------------------------------------------------------------------


def test_the_converged_target_moves_the_noise_levels_of_its_own_call_alone():
    pipe, inputs = flux(), flux_inputs(steps=STEPS)
    plain = latents_of(pipe, inputs)
    levels = pipe.scheduler.sigmas.tolist()
    _, report = run(pipe, inputs, speedup=3, reference="converged")
    used = [step.sigma for step in report.steps]
    assert used != levels[:-1] and used == sorted(used, reverse=True) and used[0] == levels[0]
    at = [i for i, multiple in enumerate(report.schedule) if multiple]
    wanted = moved_levels(levels, len(at), WARP["converged"])
    assert used == pytest.approx(wanted[:-1], abs=1e-6)
    assert torch.equal(latents_of(pipe, inputs), plain) and pipe.scheduler.sigmas.tolist() == levels


def test_image_to_image_keeps_the_noise_level_that_its_picture_was_given():
    pipe = flux("image")
    inputs = flux_inputs(steps=STEPS, image=picture(), strength=0.6)
    latents_of(pipe, inputs)
    levels = pipe.scheduler.sigmas.tolist()
    _, report = run(pipe, inputs, speedup=3, reference="converged")
    assert [step.sigma for step in report.steps] == pytest.approx(levels[-1 - len(report.steps) : -1])
    assert report.speedup_estimate >= 3


def test_the_rule_places_evaluations_denser_at_high_noise_and_never_twice():
    for steps in (8, 20, 28, 50, 100):
        for evaluations in range(1, steps + 1):
            at = evaluation_steps(steps, evaluations, 1.4)
            assert len(set(at)) == evaluations and list(at) == sorted(at) and at[0] == 0 and at[-1] < steps
    gaps = [b - a for a, b in zip(place_evaluations(10, 1.5), place_evaluations(10, 1.5)[1:])]
    assert gaps == sorted(gaps)
    curve = [1 - i / 50 for i in range(51)]
    levels = moved_levels(curve, 17, 1.4)
    assert len(levels) == 51 and levels == sorted(levels, reverse=True) and levels[0] == 1 and levels[-1] == 0
    at = evaluation_steps(50, 17, 1.4)
    assert [levels[i] for i in at] == pytest.approx([1 - u for u in place_evaluations(17, 1.4)])


# -- fitted schedules -----------------------------------------------------------------------------------------------


def test_a_fitted_schedule_runs_as_an_object_and_from_its_file(tmp_path):
    pipe, inputs = flux(), flux_inputs(steps=8)
    levels = [1.0, 0.97, 0.9, 0.8, 0.65, 0.45, 0.3, 0.1, 0.0]
    fitted = FittedSchedule(
        [1, 1, 0, 1, 0, 1, 0, 0], 2.0, 40.0, 4, sigmas=levels, reference="converged", psnr_converged=44.0
    )
    from_object, report = run(pipe, inputs, schedule=fitted)
    from_file, _ = run(pipe, inputs, schedule=str(fitted.save(tmp_path)))
    assert torch.equal(from_object, from_file)
    assert [step.sigma for step in report.steps] == pytest.approx(levels[:-1]) and report.schedule == fitted.schedule
    assert report.config["schedule"] == tuple(fitted.schedule)


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speedup", [1, 0.5, -2, 0, float("nan"), float("inf"), "3"])
def test_a_speedup_that_is_none_is_refused(speedup):
    pipe = flux()
    with pytest.raises(ConfigError, match="speedup="):
        ddit_rt.accelerate(pipe, speedup=speedup)
    assert "_ddit_pipeline" not in pipe.__dict__


def test_a_target_out_of_reach_says_how_far_it_goes_before_any_step():
    pipe, inputs = flux(), flux_inputs(steps=8)
    ddit_rt.accelerate(pipe, speedup=5)
    ran = []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ScheduleError, match="speedup=5: a run of 8 steps has to keep 2; ask for 4 at most"):
        latents_of(pipe, inputs)
    assert not ran


def test_both_targets_and_unknown_references_are_refused():
    pipe = flux()
    with pytest.raises(ConfigError, match=r"speedup=3.* and schedule="):
        ddit_rt.accelerate(pipe, speedup=3, schedule=[1, 1])
    with pytest.raises(ConfigError, match=r"speedup=3.* and quality=40"):
        ddit_rt.accelerate(pipe, speedup=3, quality=40)
    for quality in (0, -3, float("inf"), "high"):
        with pytest.raises(ConfigError, match="quality="):
            ddit_rt.accelerate(pipe, quality=quality)
    with pytest.raises(ConfigError, match="reference='best'"):
        ddit_rt.accelerate(pipe, reference="best")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ConfigError, match="reference='converged'"):
        ddit_rt.accelerate(pipe, speedup=3, reference="converged")
    assert "_ddit_pipeline" not in pipe.__dict__


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"speedup": 3, "toward_converged": 1.5}, "a number from 0 to 1"),
        ({"quality": 40, "toward_converged": 0.3}, "quality=40.*give speedup="),
        ({"reference": "converged", "toward_converged": 0.3}, "converged picture itself"),
        ({"schedule": FittedSchedule([1] * 8, 1.0, 40.0, 4, reference="converged"), "toward_converged": 1}, "itself"),
        ({"corrector": False, "toward_converged": 0.3}, "corrector=False"),
    ],
)
def test_a_share_of_no_way_is_refused(settings, why):
    pipe = flux()
    with pytest.raises(ConfigError, match=rf"toward_converged=.*{why}"):
        ddit_rt.accelerate(pipe, **settings)
    assert "_ddit_pipeline" not in pipe.__dict__


def test_half_a_policy_is_refused_before_any_step():
    class Half:
        def choose(self, step):
            return 1

    with pytest.raises(ScheduleError, match="no start"):
        ddit_rt.accelerate(flux(), schedule=Half())


@pytest.mark.parametrize("wanted", [{"speedup": 1.5}, {"schedule": [1, 1, 1, *[0, 2, 1] * 7]}, {}])
def test_a_run_between_ends_so_far_from_where_it_aims_at_plain(wanted):
    pipe, inputs = smooth(flux()), flux_inputs(steps=STEPS)
    plain, between, converged = (run(pipe, inputs, **wanted, toward_converged=share) for share in (0, 0.3, 1))
    assert plain[1].schedule == between[1].schedule == converged[1].schedule
    assert torch.equal(plain[0], run(pipe, inputs, **wanted)[0])
    way = error(plain[0], converged[0])
    assert error(between[0], torch.lerp(plain[0], converged[0], 0.3)) < way / 1000 < way


def test_a_run_between_is_nearer_to_the_converged_picture_than_the_plain_pipeline():
    pipe, inputs = smooth(flux()), flux_inputs(steps=STEPS)
    plain, converged = latents_of(pipe, inputs), latents_of(pipe, flux_inputs(steps=600))
    own, between = (run(pipe, inputs, speedup=1.5, toward_converged=share)[0] for share in (0, 0.3))
    assert error(between, converged) < error(own, converged)
    assert max(error(between, converged), error(between, plain)) < error(plain, converged)


def test_full_steps_alone_stay_the_pipelines_own_on_no_way():
    pipe, inputs = flux(), flux_inputs(steps=8)
    assert torch.equal(run(pipe, inputs, toward_converged=0.3, threshold=0)[0], latents_of(pipe, inputs))


def test_a_policy_can_be_given_by_itself():
    pipe, inputs = flux(), flux_inputs(steps=STEPS)
    assert torch.equal(run(pipe, inputs, schedule=TargetPolicy(3))[0], run(pipe, inputs, speedup=3)[0])


# -- what changes from call to call ---------------------------------------------------------------------------------


def test_an_exchanged_scheduler_is_followed_from_its_first_call_on():
    pipe, inputs = flux(), flux_inputs(steps=12)
    ddit_rt.accelerate(pipe, speedup=2, reference="converged")
    before = latents_of(pipe, inputs)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert torch.equal(latents_of(pipe, inputs), before) and torch.equal(latents_of(pipe, inputs), before)


def test_an_exchanged_scheduler_without_a_converged_picture_is_refused_before_any_step():
    pipe, inputs = flux(), flux_inputs(steps=12)
    ddit_rt.accelerate(pipe, speedup=2, reference="converged")
    kept = pipe.scheduler
    pipe.scheduler = type(kept).from_config(kept.config, stochastic_sampling=True)
    ran = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigError, match=r"reference='converged'"):
        latents_of(pipe, inputs)
    hook.remove()
    assert not ran
    pipe.scheduler = kept
    latents_of(pipe, inputs)
    assert ddit_rt.report(pipe).complete


NOISY = {
    "stochastic": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True),
    "lcm": FlowMatchLCMScheduler.from_config,
    "sde": lambda config: DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", use_dynamic_shifting=True, **FLOW
    ),
}


@pytest.mark.parametrize("noisy", NOISY)
@pytest.mark.parametrize("settings", [{"speedup": 2}, {"schedule": [1, 1, 0, 2] * 3}, {"threshold": 1.0}])
def test_runs_whose_steps_add_noise_stay_plain_and_say_why(noisy, settings):
    pipe, inputs = flux(), flux_inputs(steps=12)
    pipe.scheduler = NOISY[noisy](pipe.scheduler.config)

    def noisily():
        torch.manual_seed(3)  # some of them draw without the call's generator
        return latents_of(pipe, inputs)

    plain = noisily()
    with ddit_rt.accelerated(pipe, **settings):
        assert torch.equal(noisily(), plain)
        steps = ddit_rt.report(pipe).steps
    assert all(step.multiple == 1 and "adds noise in every step" in step.note for step in steps)


CONVERGED = FittedSchedule([1, 1, 0, 1, 0, 1, 0, 0], 2.0, 40.0, 4, reference="converged")


@pytest.mark.parametrize("settings", [{"reference": "converged"}, {"toward_converged": 0.3}, {"schedule": CONVERGED}])
def test_where_a_scheduler_cannot_aim_is_refused_however_it_is_asked(settings):
    pipe, inputs = flux(), flux_inputs(steps=8)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    with pytest.raises(ConfigError, match=r"converged.*FlowMatchEulerDiscreteScheduler"):
        ddit_rt.accelerate(pipe, **settings)
    ddit_rt.accelerate(pipe, speedup=2)
    latents_of(pipe, inputs)
    before = ddit_rt.report(pipe)
    with pytest.raises(ConfigError, match="converged"), configured(pipe, settings):
        latents_of(pipe, inputs)
    assert ddit_rt.report(pipe) is before, "no step was made"


def test_a_call_with_noise_levels_of_its_own_runs_no_kept_schedule(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    pipe = flux()
    # FLUX puts its default into sigmas before it begins: only what was given counts
    prompt = {name: flux_inputs()[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    ddit_rt.fit(pipe, [prompt], speedup=2, kinds=(1, 0), num_inference_steps=12, height=64, width=64)
    ddit_rt.accelerate(pipe, speedup=2)
    for own, kept in (({}, True), ({"sigmas": [1 - (i / 12) ** 1.5 for i in range(12)]}, False)):
        latents_of(pipe, {**flux_inputs(steps=12), **own})
        assert (ddit_rt.report(pipe).kept is not None) is kept


LEVELS = [1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1]


@pytest.mark.parametrize(
    ("last", "given", "why"),
    [(0.0, {"sigmas": LEVELS[:1] + LEVELS[2:] + [0.05]}, "the call gives others"), (0.05, {}, "end at 0.05, .* at 0")],
)
def test_a_schedules_own_noise_levels_are_not_run_where_they_do_not_fit(last, given, why):
    pipe, inputs = flux(), flux_inputs(steps=8)
    own = FittedSchedule([1, 1, 0, 1, 0, 1, 0, 0], 2.0, 40.0, 4, sigmas=[*LEVELS, last], reference="converged")
    ddit_rt.accelerate(pipe, schedule=own)
    ran = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ScheduleError, match=why):
        latents_of(pipe, {**inputs, **given})
    hook.remove()
    assert not ran
    ddit_rt.restore(pipe)
    ddit_rt.accelerate(pipe, schedule=own.schedule)
    assert latents_of(pipe, {**inputs, **given}).isfinite().all()


class Passing(FluxImg2ImgPipeline):
    """Names none of the arguments that it passes on."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_arguments_are_seen_through_a_subclass_that_does_not_name_them():
    base, inputs = flux("image"), flux_inputs(steps=12, image=picture(), strength=0.6)
    settings = {"speedup": 2, "reference": "converged"}
    wanted, report = run(base, inputs, **settings)
    latents, other = run(Passing(**base.components), inputs, **settings)
    assert torch.equal(latents, wanted)
    assert [step.sigma for step in other.steps] == [step.sigma for step in report.steps]


def test_a_run_too_short_for_any_speed_up_says_so():
    pipe = flux()
    with pytest.raises(ScheduleError, match=r"a run of 2 steps has to keep 2; make more steps, or give no target"):
        run(pipe, flux_inputs(steps=2), speedup=2)
