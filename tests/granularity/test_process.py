"""A variance-preserving process in a flow's terms: states, velocities and times, against their definitions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from ddit_rt.granularity import Models, VariancePreserving, bands
from ddit_rt.schedule import training_levels

PREDICTIONS = ["epsilon", "v_prediction"]
LEVELS = [0.02, 0.3, 0.5, 0.9, 0.99]


def process(predicts="epsilon"):
    return VariancePreserving(predicts, training_levels(DDIMScheduler()))


def parts(sigma):
    """Clean, noise, α, β of a state whose flow level is σ."""
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    size = math.hypot(1 - sigma, sigma)
    return clean, noise, (1 - sigma) / size, sigma / size


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_states_and_predictions_are_what_their_definitions_say(predicts, sigma):
    clean, noise, alpha, beta = parts(sigma)
    latent = alpha * clean + beta * noise
    predicted = noise if predicts == "epsilon" else alpha * noise - beta * clean
    made = process(predicts)
    state = made.state(latent, sigma)
    torch.testing.assert_close(state, (1 - sigma) * clean + sigma * noise)
    torch.testing.assert_close(made.velocity(predicted, state, sigma), noise - clean)
    torch.testing.assert_close(made.prediction(noise - clean, state, sigma), predicted)
    torch.testing.assert_close(made.latent(state, sigma), latent)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_step_of_ddim_is_eulers_step_of_the_flow(predicts):
    scheduler = DDIMScheduler(prediction_type=predicts, clip_sample=False)
    scheduler.set_timesteps(10)
    made = VariancePreserving(predicts, training_levels(scheduler))
    latent, prediction, *_ = parts(0.5)
    here, there = (float(made.levels[t]) for t in scheduler.timesteps[3:5])
    state = made.state(latent, here)
    velocity = made.velocity(prediction, state, here)
    moved = scheduler.step(prediction, scheduler.timesteps[3], latent).prev_sample
    torch.testing.assert_close(made.state(moved, there), state + (there - here) * velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_levels_as_tensors_give_what_numbers_give(predicts):
    made, sigma = process(predicts), 0.37
    clean, noise, *_ = (part.float() if isinstance(part, torch.Tensor) else part for part in parts(sigma))
    for level in (torch.tensor(sigma, dtype=torch.float64), torch.full((2, 1, 1, 1, 1), sigma)):
        for name in ("velocity", "prediction"):
            found = getattr(made, name)(noise, clean, level)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, getattr(made, name)(noise, clean, sigma), rtol=1e-5, atol=1e-5)
        assert made.time(level).shape == level.shape
        torch.testing.assert_close(made.time(level).flatten()[0].double().item(), made.time(sigma), rtol=1e-4, atol=0)


def test_times_are_the_timesteps_of_training_and_lie_between_them():
    made = process()
    for timestep in (0, 1, 500, 998, 999):
        assert made.time(float(made.levels[timestep])) * 1000 == pytest.approx(timestep, abs=1e-6)
    between = float(made.levels[400:402].mean())
    assert made.time(between) * 1000 == pytest.approx(400.5)
    assert made.time(float(made.levels[0]) / 3) == 0 and made.time(1.0) == 0.999


def test_the_low_band_of_a_state_is_the_models_own_state_of_a_smaller_picture():
    """The k x k means of αx + βn, rescaled, are α'x' + β'n' with α'² + β'² = 1 and unit noise."""
    sigma, multiple = 0.8, 2
    clean, noise, alpha, beta = parts(sigma)
    made = process()
    state = made.state(alpha * clean + beta * noise, sigma)
    low, low_sigma = bands.low_state(state, sigma, multiple)
    size = math.hypot(1 - low_sigma, low_sigma)
    wanted = (1 - low_sigma) / size * bands.down(clean, multiple) + low_sigma / size * (
        multiple * bands.down(noise, multiple)
    )
    torch.testing.assert_close(made.latent(low, low_sigma), wanted)


def test_what_an_adapter_reads_and_gives_beside_the_latent_stays():
    made, (clean, noise, *_) = process(), parts(0.4)
    state, beside = clean.float(), noise.float()
    seen = []

    def own(given, time, multiple):
        seen.append((given, time))
        return torch.cat([given, given], dim=1)

    models = made.models(Models(lambda given, *_: given, own), 4)
    found = models.tokens(torch.cat([state, beside], dim=1), 0.4, 2)
    given, time = seen[0]
    assert torch.equal(given[:, 4:], beside) and torch.equal(given[:, :4], made.latent(state, 0.4))
    assert time == made.time(0.4)
    assert torch.equal(found[:, :4], made.velocity(given[:, :4], state, 0.4)) and torch.equal(found[:, 4:8], beside)
    assert torch.equal(models.low(state, 0.4, 2), found[:, :4])
