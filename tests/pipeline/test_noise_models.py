"""Pipelines whose model predicts noise or v: skipped steps, the corrector, targets, and what is refused."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    UniPCMultistepScheduler,
)
from schedulers import FLOW as FLOW_SETTINGS
from specimens import SPECIMENS
from tiny import flux

import ddit_rt
from ddit_rt.families.testing import run
from ddit_rt.granularity import VariancePreserving
from ddit_rt.pipeline.process import process_of
from ddit_rt.pipeline.stepping import solved_step
from ddit_rt.schedule import FlowSolver, Ran, levels_of, step_with_increment

STEPS = 20
SCHEDULERS = {
    "ddim": lambda **more: DDIMScheduler(clip_sample=False, **more),
    "dpm": DPMSolverMultistepScheduler,
    "single": DPMSolverSinglestepScheduler,
    "deis": DEISMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
PREDICTIONS = ["epsilon", "v_prediction"]


def noise(dtype=torch.float32):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def steady(state, sigma):
    """A velocity that is a parabola in σ, whatever the state."""
    return (0.3 - 0.8 * sigma + 1.7 * sigma**2) * torch.ones_like(state)


def bent(state, sigma):
    return torch.sin(2 * state) * 0.6 + state.roll(1, -1) * 0.3 + sigma**2


def moved(scheduler, field, schedule, dtype=torch.float32, corrector=True):
    """The latent after a run that asks ``field`` at the steps of ``schedule`` that are not 0."""
    scheduler.set_timesteps(STEPS)
    levels, process = levels_of(scheduler), process_of(scheduler)
    solver = FlowSolver(scheduler, levels, 0.0)
    latent, velocity = noise(dtype), None
    for index, timestep in enumerate(scheduler.timesteps):
        state = process.state(latent.float(), levels[index])
        velocity = field(state, levels[index]) if schedule[index] else velocity
        output = process.prediction(velocity, state, levels[index]).to(dtype)

        def own(prediction, sample, timestep=timestep):
            return step_with_increment(scheduler.step, scheduler, prediction, timestep, sample, return_dict=False)

        if corrector:
            made = (index, Ran.FULL if schedule[index] else Ran.SKIPPED, (1, 1))
            result, increment = solved_step(
                solver, process, (levels[index], levels[index + 1]), made, output, latent, own
            )
        else:
            result, increment = own(output, latent)
        assert increment.dtype == torch.float32 and result[0].dtype == dtype
        latent = result[0]
    return latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_gaps_the_scheduler_moves_the_latent_bit_for_bit(name, prediction, dtype):
    made = [
        moved(SCHEDULERS[name](prediction_type=prediction), bent, [1] * STEPS, dtype, corrector)
        for corrector in (True, False)
    ]
    assert torch.equal(*made) and torch.isfinite(made[0]).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddims_gaps_come_near_the_sum_of_its_own_steps(prediction):
    """As Euler's do, but for the part of the parabola's bend that is not trusted."""
    schedule = [1, 1, *([1, 0, 0] * 5), 1, 1, 1]
    whole, found, left = (
        moved(SCHEDULERS["ddim"](prediction_type=prediction), steady, *rest)
        for rest in (([1] * STEPS,), (schedule,), (schedule, torch.float32, False))
    )
    assert (left - whole).abs().max() > 10 * (found - whole).abs().max()


@pytest.mark.parametrize("name", ["ddim", "dpm", "deis", "unipc"])
def test_the_corrector_brings_a_run_with_gaps_nearer_to_the_whole(name):
    schedule = [1, 1, 1, *([1, 0] * 8), 1]
    whole, found, left = (
        moved(SCHEDULERS[name](), bent, *rest)
        for rest in (([1] * STEPS,), (schedule,), (schedule, torch.float32, False))
    )
    assert (found - whole).square().mean() < 0.5 * (left - whole).square().mean()


def specimen(name="pixart-sigma", scheduler=None):
    pipe = SPECIMENS[name].make()
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe, SPECIMENS[name].arguments


@pytest.mark.parametrize("name", ["dit", "pixart-sigma"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_known_scheduler_runs_full_coarse_and_skipped_steps(name, scheduler):
    pipe, arguments = specimen(name, SCHEDULERS[scheduler]())
    plain = run(pipe, arguments(guided=True))
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, arguments(guided=True)), plain)
    schedule = [1, 1, 2, 4, 1, 0, 2, 1]
    for coarse in ("delta", "naive"):
        with ddit_rt.accelerated(pipe, schedule=schedule, coarse=coarse):
            found = run(pipe, arguments(guided=True))
            report = ddit_rt.report(pipe)
        assert report.schedule == schedule and report.complete and torch.isfinite(found).all()
        assert not torch.equal(found, plain)
        assert report.steps[4].missed is None and report.steps[6].missed is None


def test_the_reports_levels_are_the_flows():
    pipe, arguments = specimen()
    with ddit_rt.accelerated(pipe, threshold=0):
        run(pipe, arguments())
        report = ddit_rt.report(pipe)
    assert [step.sigma for step in report.steps] == levels_of(pipe.scheduler)[:-1]
    assert [step.timestep for step in report.steps] == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_targets_go_by_the_rule(scheduler):
    pipe, arguments = specimen(scheduler=SCHEDULERS[scheduler]())
    for target in ({"speedup": 2.0}, {"quality": 35.0}):
        with ddit_rt.accelerated(pipe, **target):
            run(pipe, arguments(steps=20))
            report = ddit_rt.report(pipe)
        assert set(report.schedule) == {0, 1} and report.speedup_estimate > 1.4
        assert any(step.missed is not None for step in report.steps), "no gap was closed"
    with pytest.raises(ddit_rt.ConfigError, match="converged"):
        ddit_rt.accelerate(pipe, speedup=2.0, reference="converged")


def test_what_needs_recordings_says_that_there_are_none():
    pipe, arguments = specimen()
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match=r"predicts no flow.*speedup="):
        ddit_rt.fit(pipe, ["a"], speedup=2.0, call=arguments())


def test_a_call_that_adds_noise_runs_full_and_says_why():
    pipe, arguments = specimen()
    plain = run(pipe, {**arguments(), "eta": 0.7})
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 4, 1, 0, 2, 1]):
        assert torch.equal(run(pipe, {**arguments(), "eta": 0.7}), plain)
        assert all("eta=0.7 adds noise" in step.note for step in ddit_rt.report(pipe).steps)
        run(pipe, arguments())
        assert not any(step.note for step in ddit_rt.report(pipe).steps)


def test_schedulers_that_add_noise_are_refused_before_anything_is_changed():
    pipe, _ = specimen(scheduler=DDPMScheduler())
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="DDPMScheduler cannot be accelerated"):
        ddit_rt.accelerate(pipe)
    assert "forward" not in pipe.transformer.__dict__


def test_a_flows_pipeline_still_takes_no_scheduler_of_noise_prediction():
    pipe = flux()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="does not predict a flow"):
        ddit_rt.accelerate(pipe)


def test_a_model_trained_to_predict_a_flow_stays_one():
    """DiT's architecture serves flows too: then nothing is converted."""
    pipe, arguments = specimen(scheduler=DPMSolverMultistepScheduler(**FLOW_SETTINGS))
    assert process_of(pipe.scheduler) is None
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 4, 1, 0, 2, 1]):
        assert torch.isfinite(run(pipe, arguments())).all()
        assert ddit_rt.report(pipe).complete


class FlowTwin(PixArtTransformer2DModel):
    """The same network, asked for the velocity at flow states: noise prediction is hidden inside."""

    process: VariancePreserving

    def forward(self, hidden_states, timestep=None, return_dict=True, **arguments):
        sigma = (timestep.double() / 1000).view(-1, 1, 1, 1)
        time = self.process.time(timestep.double() / 1000) * 1000
        latent = self.process.latent(hidden_states, sigma).float()
        (raw,) = super().forward(latent, timestep=time, return_dict=False, **arguments)
        return (self.process.velocity(raw[:, :4], hidden_states, sigma).float(),)


def euler_between(levels):
    """Euler's method of the flow, with what a pipeline for noise prediction asks of its scheduler."""
    euler = FlowMatchEulerDiscreteScheduler()
    own = euler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None):
        own(num_inference_steps, device=device)
        euler.sigmas = torch.tensor(levels)
        euler.timesteps = euler.sigmas[:-1] * 1000

    euler.init_noise_sigma = 1.0
    euler.scale_model_input = lambda sample, timestep: sample
    euler.set_timesteps = set_timesteps
    return euler


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("coarse", ["delta", "band-split", "extrapolate"])
def test_a_run_is_that_of_the_flow_that_the_model_amounts_to(coarse, prediction):
    """Coarse and skipped steps, residuals, forecasts and the corrector: the same in either language."""
    settings = {"schedule": [1, 1, 1, 2, 4, 1, 0, 0, 1, 2, 0, 1], "coarse": coarse}
    scheduler = SCHEDULERS["ddim"](prediction_type=prediction)
    pipe, arguments = specimen(scheduler=scheduler)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    call = {**arguments(guided=True, steps=12), "latents": noise}
    with ddit_rt.accelerated(pipe, **settings):
        found = run(pipe, call)
        wanted_report = ddit_rt.report(pipe)

    levels, process = levels_of(scheduler), process_of(scheduler)
    twin, _ = specimen()
    module = FlowTwin.from_config({**twin.transformer.config, "out_channels": 4})
    module.out_channels, module.process = 4, process
    own = twin.transformer
    kept = own.proj_out.weight.unflatten(0, (4, 8))[:, :4].flatten(0, 1), own.proj_out.bias.view(4, 8)[:, :4].flatten()
    module.load_state_dict({**own.state_dict(), "proj_out.weight": kept[0], "proj_out.bias": kept[1]})
    twin.register_modules(transformer=module.eval().requires_grad_(False), scheduler=euler_between(levels))
    with ddit_rt.accelerated(twin, **settings):
        wanted = run(twin, {**call, "latents": process.state(noise, levels[0])})
        report = ddit_rt.report(twin)
    assert report.schedule == wanted_report.schedule == settings["schedule"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    missed = [[step.missed for step in one.steps if step.missed is not None] for one in (report, wanted_report)]
    assert missed[0] == pytest.approx(missed[1], rel=1e-3) and missed[0]


def test_the_scheduler_may_be_exchanged_between_calls():
    pipe, arguments = specimen()
    schedule = [1, 1, 2, 4, 1, 0, 2, 1]
    with ddit_rt.accelerated(pipe, schedule=schedule):
        run(pipe, arguments())
        pipe.scheduler = DPMSolverMultistepScheduler()
        found = run(pipe, arguments())
    other, _ = specimen(scheduler=DPMSolverMultistepScheduler())
    with ddit_rt.accelerated(other, schedule=schedule):
        assert torch.equal(run(other, arguments()), found)
    assert isinstance(process_of(other.scheduler), VariancePreserving)
