"""The algebra of the band split: exact, orthogonal, and right for a model that knows the answer."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt.granularity import bands

multiples = st.sampled_from([2, 4])
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
sigmas = st.floats(0.02, 1.0)


def random(shape, multiple, seed=0):
    batch, channels, frames, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    size = (batch, channels, frames, rows * multiple, columns * multiple)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@given(shapes, multiples)
def test_the_split_is_exact_and_orthogonal(shape, multiple):
    latent = random(shape, multiple)
    low, high = bands.up(bands.down(latent, multiple), multiple), bands.high_band(latent, multiple)
    torch.testing.assert_close(low + high, latent)
    assert abs((low * high).sum().item()) < 1e-9
    assert bands.down(high, multiple).abs().max() < 1e-12


@given(shapes, multiples)
def test_down_is_the_mean_of_a_block_and_undoes_up(shape, multiple):
    latent = random(shape, multiple)
    low = bands.down(latent, multiple)
    torch.testing.assert_close(low[..., 0, 0], latent[..., :multiple, :multiple].mean((-1, -2)))
    torch.testing.assert_close(bands.down(bands.up(low, multiple), multiple), low)


@given(shapes, multiples, sigmas)
def test_the_low_state_is_a_flow_matching_state_of_the_small_picture(shape, multiple, sigma):
    clean, noise = random(shape, multiple), random(shape, multiple, seed=1)
    low, low_sigma = bands.low_state((1 - sigma) * clean + sigma * noise, sigma, multiple)
    unit_noise = multiple * bands.down(noise, multiple)  # the mean of k x k normals has standard deviation 1/k
    torch.testing.assert_close(low, (1 - low_sigma) * bands.down(clean, multiple) + low_sigma * unit_noise)
    assert 0 < low_sigma <= 1


@given(shapes, multiples, sigmas)
def test_a_model_that_knows_the_answer_gives_the_exact_low_band_of_the_velocity(shape, multiple, sigma):
    clean, noise = random(shape, multiple), random(shape, multiple, seed=1)
    low, low_sigma = bands.low_state((1 - sigma) * clean + sigma * noise, sigma, multiple)
    answer = multiple * bands.down(noise, multiple) - bands.down(clean, multiple)
    velocity = bands.low_velocity(low, low_sigma, answer, multiple)
    torch.testing.assert_close(velocity, bands.down(noise - clean, multiple))
