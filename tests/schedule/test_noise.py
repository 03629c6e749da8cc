"""What is read of schedulers: what they predict, where their steps lie, which add noise."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from ddit_rt import ConfigError, UnsupportedPipelineError
from ddit_rt.schedule import (
    check_process,
    check_reference,
    follows_the_flow,
    levels_of,
    noise_of_call,
    preserves_variance,
    solves_the_flow,
    training_levels,
)

KNOWN = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KNOWN)
def test_levels_are_the_noise_shares_of_the_states_that_are_stepped_between(kind, prediction):
    scheduler = kind(prediction_type=prediction)
    scheduler.set_timesteps(12)
    check_process(scheduler, True)
    levels = levels_of(scheduler)
    assert len(levels) == len(scheduler.timesteps) + 1
    signal = scheduler.alphas_cumprod[scheduler.timesteps].double()
    wanted = (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())
    torch.testing.assert_close(torch.tensor(levels[:-1], dtype=torch.float64), wanted, rtol=1e-4, atol=1e-5)
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize("kind", KNOWN)
def test_perfect_predictions_bring_a_latent_to_the_level_after_each_step(kind):
    """αx + βn stays one, with the α and β of the next level: DDIM, and every multistep solver while x is constant."""
    scheduler = kind(**({"clip_sample": False} if kind is DDIMScheduler else {}))
    scheduler.set_timesteps(10)
    levels = levels_of(scheduler)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def latent(sigma):
        return ((1 - sigma) * clean + sigma * noise) / ((1 - sigma) ** 2 + sigma**2) ** 0.5

    moved = latent(levels[0])
    for index, timestep in enumerate(scheduler.timesteps):
        moved = scheduler.step(noise, timestep, moved, return_dict=False)[0]
        torch.testing.assert_close(moved, latent(levels[index + 1]), rtol=1e-3, atol=1e-3, check_dtype=False)


def test_where_ddims_last_step_leads_is_what_it_is_told():
    ends = []
    for at_one in (True, False):
        scheduler = DDIMScheduler(set_alpha_to_one=at_one)
        scheduler.set_timesteps(10)
        ends.append(levels_of(scheduler)[-1])
    assert ends[0] == 0 and ends[1] == pytest.approx(float(training_levels(scheduler)[0]))


def test_karras_spacing_keeps_its_own_levels_though_timesteps_are_whole():
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    levels = levels_of(scheduler)
    assert [s / (1 + s) for s in scheduler.sigmas.tolist()] == pytest.approx(levels)


@pytest.mark.parametrize(
    "scheduler, reason",
    [
        (DDPMScheduler(), "DDPMScheduler cannot be accelerated: it adds noise"),
        (LCMScheduler(), "LCMScheduler"),
        (SASolverScheduler(), "SASolverScheduler"),
        (EulerDiscreteScheduler(), "another scale"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "sde-dpmsolver.* adds noise"),
        (DDIMScheduler(prediction_type="sample"), "prediction_type='sample'"),
    ],
)
def test_other_schedulers_are_refused_with_the_reason_and_the_way_out(scheduler, reason):
    with pytest.raises(UnsupportedPipelineError, match=reason + ".*DDIMScheduler.from_config"):
        check_process(scheduler, True)


def test_models_of_flows_alone_take_no_scheduler_of_noise_prediction():
    with pytest.raises(UnsupportedPipelineError, match="does not predict a flow"):
        check_process(DDIMScheduler(), False)
    for variance_preserving in (True, False):
        check_process(FlowMatchEulerDiscreteScheduler(), variance_preserving)


def test_no_converged_picture_is_aimed_at_without_a_flow():
    scheduler = DPMSolverMultistepScheduler()
    assert preserves_variance(scheduler) and not solves_the_flow(scheduler)
    with pytest.raises(ConfigError, match="predicts no flow"):
        check_reference("converged", scheduler)


@pytest.mark.parametrize(
    "settings, steps, follows",
    [
        ({"clip_sample": False}, 10, True),
        ({"clip_sample": True}, 10, False),
        ({"clip_sample": False, "thresholding": True}, 10, False),
        ({"clip_sample": False, "timestep_spacing": "linspace"}, 12, False),
    ],
)
def test_ddim_is_eulers_method_only_as_far_as_it_is(settings, steps, follows):
    scheduler = DDIMScheduler(**settings)
    scheduler.set_timesteps(steps)
    assert follows_the_flow(scheduler) is follows


def test_eta_is_noise():
    assert noise_of_call(DDIMScheduler(), {"eta": 0.5}) == "eta=0.5"
    assert not noise_of_call(DDIMScheduler(), {"eta": 0.0}) and not noise_of_call(DDIMScheduler(), {})
    assert not noise_of_call(DPMSolverMultistepScheduler(), {"eta": 0.5})  # it takes none


def test_schedulers_of_a_flow_that_add_noise_are_told_by_name():
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert noise_of_call(stochastic, {}) == "stochastic_sampling=True"
    assert noise_of_call(FlowMatchLCMScheduler(), {}) == "FlowMatchLCMScheduler"
    assert not noise_of_call(FlowMatchEulerDiscreteScheduler(), {})
