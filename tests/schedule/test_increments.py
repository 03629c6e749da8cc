"""Increments in every scheduler: float32, the scheduler's own result, nothing lost to rounding."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from schedulers import SCHEDULERS as SOLVERS

from ddit_rt.schedule import step_with_increment

SCHEDULERS = SOLVERS | {
    "euler-stochastic": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
}
STEPS = 6


def velocity(latent, timestep):
    return torch.sin(3 * latent) * 0.1 + latent.roll(1, -1) * 0.2 + float(timestep) / 5000


def run(scheduler, dtype, latent_dtype=None, instrumented=False, return_dict=False):
    """Latents of a short run, with the increments if it is instrumented."""
    torch.manual_seed(0)
    scheduler.set_timesteps(STEPS)
    latents = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(latent_dtype or dtype)]
    increments = []
    for timestep in scheduler.timesteps:
        prediction = velocity(latents[-1].float(), timestep).to(dtype)
        if instrumented:
            result, increment = step_with_increment(
                scheduler.step, scheduler, prediction, timestep, latents[-1], return_dict=return_dict
            )
            increments.append(increment)
        else:
            result = scheduler.step(prediction, timestep, latents[-1], return_dict=return_dict)
        latents.append(result.prev_sample if return_dict else result[0])
    return latents, increments


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_in_float32_the_result_is_the_schedulers_own_and_the_increment_its_difference(name, return_dict):
    plain, _ = run(SCHEDULERS[name](), torch.float32, return_dict=return_dict)
    latents, increments = run(SCHEDULERS[name](), torch.float32, instrumented=True, return_dict=return_dict)
    for step, increment in enumerate(increments):
        assert torch.equal(latents[step + 1], plain[step + 1])
        assert increment.dtype == torch.float32
        assert torch.equal(increment, latents[step + 1] - latents[step])


@pytest.mark.parametrize("latent_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_euler_in_half_precision_is_the_schedulers_own_and_its_increments_are_exact(dtype, latent_dtype):
    plain, _ = run(SCHEDULERS["euler"](), dtype, latent_dtype)
    scheduler = SCHEDULERS["euler"]()
    latents, increments = run(scheduler, dtype, latent_dtype, instrumented=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(latents, plain))
    for step, increment in enumerate(increments):
        prediction = velocity(latents[step].float(), scheduler.timesteps[step]).to(dtype).float()
        exact = (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * prediction
        torch.testing.assert_close(increment, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["heun", "unipc", "dpm"])
def test_other_schedulers_in_half_precision_lose_only_the_rounding_of_the_latent(name):
    """Each step's increment, from the same rounded inputs, equals that of a scheduler in float32."""
    scheduler, exact = SCHEDULERS[name](), SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    exact.set_timesteps(STEPS)
    latent = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    for timestep in scheduler.timesteps:
        prediction = velocity(latent.float(), timestep).bfloat16()
        result, increment = step_with_increment(
            scheduler.step, scheduler, prediction, timestep, latent, return_dict=False
        )
        wanted = exact.step(prediction.float(), timestep, latent.float(), return_dict=False)[0] - latent.float()
        torch.testing.assert_close(increment, wanted, rtol=1e-6, atol=1e-7)
        assert result[0].dtype == torch.bfloat16
        latent = result[0]


def test_arguments_of_step_may_come_by_name_and_position():
    scheduler = SCHEDULERS["euler"]()
    scheduler.set_timesteps(STEPS)
    latent, prediction = torch.zeros(1, 2), torch.ones(1, 2)
    result, increment = step_with_increment(
        scheduler.step, scheduler, prediction, scheduler.timesteps[0], latent, 0.0, 0.0, s_noise=1.0
    )
    assert torch.equal(result.prev_sample, latent + increment)
