"""The coarse paths against models whose answers are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt.granularity import (
    Anchor,
    Geometry,
    Models,
    PathOptions,
    PredictionHistory,
    bands,
    crop_to_latent,
    line,
    make_path,
    pad_to_grid,
)

multiples = st.sampled_from([2, 4])
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
levels = st.floats(0.05, 1.0)


def random(grid, seed):
    size = (2, 3, 2, 2 * grid[0], 2 * grid[1])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def geometry_of(latent):
    return Geometry(latent.shape[1], latent.shape[2], latent.shape[3], latent.shape[4], 2)


def arbitrary(latent, sigma, multiple):
    """A model without any meaning, of the shape of a real one."""
    return torch.tanh(latent * 1.3 + sigma) - latent.roll(1, 1) * 0.4


class Counted:
    def __init__(self, model):
        self.model, self.runs = model, 0

    def __call__(self, *args):
        self.runs += 1
        return self.model(*args)


def models(low=arbitrary, tokens=arbitrary):
    return Models(low, tokens)


def trajectory(*anchors):
    result = PredictionHistory()
    for anchor in anchors:
        result.add_full(anchor)
    return result


def fine_velocity(latent, sigma):
    return torch.sin(latent + sigma)


@given(grids, multiples, levels, st.sampled_from(["constant", "linear"]), st.sampled_from(["clean", "line"]))
def test_delta_is_exact_at_its_anchor(grid, multiple, sigma, residual, high_band):
    """At the anchor's own latent and σ the coarse model's bias cancels: the prediction is the full model's."""
    latent = random(grid, 0)
    full = fine_velocity(latent, sigma)
    anchors = trajectory(Anchor(1.5, random(grid, 1), random(grid, 2), models()), Anchor(sigma, latent, full, models()))
    path = make_path("delta", PathOptions(residual, high_band))
    result = path.predict(anchors, latent, sigma, multiple, geometry_of(latent), models())
    torch.testing.assert_close(result, full, rtol=1e-4, atol=2e-4)


@given(grids, multiples)
def test_high_band_follows_the_line_through_the_last_two_fine_predictions(grid, multiple):
    older, newer = (Anchor(s, random(grid, i), random(grid, i + 2), models()) for i, s in enumerate((0.9, 0.7)))
    latent = random(grid, 5)
    geometry = geometry_of(latent)
    line = newer.prediction + (newer.prediction - older.prediction)  # σ 0.5 is as far again
    path = make_path("delta", PathOptions("linear", "line"))
    result = path.predict(trajectory(older, newer), latent, 0.5, multiple, geometry, models())

    def padded(value):
        return pad_to_grid(value, geometry, multiple)

    expected = crop_to_latent(bands.high_band(padded(line), multiple), geometry)
    # whatever the coarse model said is constant within its patches
    rest = bands.high_band(padded(result - expected), multiple)
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=2e-5)


@given(grids, multiples, levels)
def test_band_split_with_a_perfect_model_and_the_clean_high_band_is_exact(grid, multiple, sigma):
    clean, noise = random(grid, 0), random(grid, 1)
    geometry = geometry_of(clean)
    padded_clean, padded_noise = (pad_to_grid(x, geometry, multiple) for x in (clean, noise))

    def perfect(low, low_sigma, k):
        return k * bands.down(padded_noise, k) - bands.down(padded_clean, k)

    latent = (1 - sigma) * clean + sigma * noise
    # an anchor from which the clean latent can be read: z = x at σ = 0
    anchors = trajectory(Anchor(0.0, clean, torch.zeros_like(clean), models(perfect)))
    result = make_path("band-split", PathOptions("constant", "clean")).predict(
        anchors, latent, sigma, multiple, geometry, models(perfect)
    )
    torch.testing.assert_close(result, noise - clean, rtol=1e-3, atol=1e-3)


@given(grids, multiples, levels)
def test_before_any_fine_step_the_high_band_counts_as_noise(grid, multiple, sigma):
    latent = random(grid, 0)
    geometry = geometry_of(latent)
    for name in ("delta", "band-split"):
        result = make_path(name, PathOptions("linear", "clean")).predict(
            PredictionHistory(), latent, sigma, multiple, geometry, models()
        )
        low = bands.down(pad_to_grid(result, geometry, multiple), multiple)
        high = bands.high_band(pad_to_grid(latent, geometry, multiple), multiple) / sigma
        if latent.shape[3] % (2 * multiple) == latent.shape[4] % (2 * multiple) == 0:
            torch.testing.assert_close(result - bands.up(low, multiple), high, rtol=1e-4, atol=1e-4)
        assert result.shape == latent.shape


@pytest.mark.parametrize("multiple", [2, 4])
def test_a_residual_that_is_linear_in_sigma_is_extrapolated_exactly(multiple):
    grid = (8, 4)
    offset, slope = (bands.down(random(grid, seed), multiple) for seed in (1, 2))

    def coarse_low_band(latent, sigma):
        low, low_sigma = bands.low_state(latent, sigma, multiple)
        return bands.low_velocity(low, low_sigma, arbitrary(low, low_sigma, multiple), multiple)

    def full(latent, sigma):  # what the coarse model misses is offset + slope σ
        return bands.up(coarse_low_band(latent, sigma) + offset + slope * sigma, multiple)

    first, second, latent = (random(grid, seed) for seed in (3, 4, 5))
    anchors = trajectory(
        Anchor(0.95, first, full(first, 0.95), models()), Anchor(0.7, second, full(second, 0.7), models())
    )
    geometry = geometry_of(latent)
    low = {}
    for residual in ("linear", "constant"):
        result = make_path("delta", PathOptions(residual, "clean")).predict(
            anchors, latent, 0.5, multiple, geometry, models()
        )
        low[residual] = bands.down(result, multiple)
    wanted = bands.down(full(latent, 0.5), multiple)
    torch.testing.assert_close(low["linear"], wanted, rtol=1e-4, atol=1e-4)
    assert (low["constant"] - wanted).abs().max() > 0.1


def test_an_anchor_is_measured_once_per_multiple():
    latent = random((8, 8), 0)
    probe = Counted(arbitrary)
    anchors = trajectory(Anchor(0.9, latent, latent, models(probe)), Anchor(0.8, latent, latent, models(probe)))
    path = make_path("delta", PathOptions("linear", "clean"))
    for multiple, runs in ((2, 2), (2, 2), (4, 4), (2, 4)):
        path.predict(anchors, latent, 0.5, multiple, geometry_of(latent), models())
        assert probe.runs == runs


def test_only_the_last_two_fine_steps_are_kept():
    steps = [Anchor(1 - i / 10, torch.zeros(1), torch.zeros(1), models()) for i in range(4)]
    assert [anchor.sigma for anchor in trajectory(*steps).anchors] == [0.8, 0.7]


def test_a_second_fine_step_at_the_same_sigma_replaces_the_first():
    steps = [
        Anchor(s, torch.zeros(1), torch.full((1,), value), models())
        for s, value in ((0.9, 0.0), (0.8, 1.0), (0.8, 2.0))
    ]
    kept = trajectory(*steps)
    assert [anchor.sigma for anchor in kept.anchors] == [0.9, 0.8]
    assert kept.forecast(0.7).item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_line_is_followed_no_further_than_its_two_points_lie_apart(kind):
    older, newest = (kind(0.9), torch.tensor([1.0])), (kind(0.8), torch.tensor([3.0]))
    found = [line(older, newest, kind(sigma)).item() for sigma in (0.8, 0.75, 0.7, 0.6, 0.1)]
    assert found == pytest.approx([3.0, 4.0, 5.0, 5.0, 5.0], rel=1e-5)


@given(grids, levels)
def test_reuse_repeats_and_extrapolate_draws_the_line(grid, sigma):
    latent, older, newer = (random(grid, seed) for seed in range(3))
    anchors = trajectory(Anchor(1.1, latent, older, models()), Anchor(1.05, latent, newer, models()))
    never = Models(None, None)
    geometry = geometry_of(latent)
    assert torch.equal(
        make_path("reuse", PathOptions("linear", "clean")).predict(anchors, latent, sigma, 2, geometry, never), newer
    )
    drawn = newer + min((sigma - 1.05) / (1.05 - 1.1), 1) * (newer - older)
    result = make_path("extrapolate", PathOptions()).predict(anchors, latent, sigma, 2, geometry, never)
    torch.testing.assert_close(result, drawn, rtol=1e-4, atol=1e-4)


def test_with_one_fine_step_extrapolation_is_reuse():
    latent, full = random((2, 2), 0), random((2, 2), 1)
    anchors = trajectory(Anchor(1.0, latent, full, models()))
    result = make_path("extrapolate", PathOptions()).predict(
        anchors, latent, 0.5, 2, geometry_of(latent), Models(None, None)
    )
    assert torch.equal(result, full)


@given(grids, multiples)
def test_naive_runs_the_model_on_the_padded_latent_and_crops(grid, multiple):
    latent = random(grid, 0)
    geometry = geometry_of(latent)
    result = make_path("naive", PathOptions("linear", "clean")).predict(
        PredictionHistory(), latent, 0.5, multiple, geometry, models()
    )
    padded = pad_to_grid(latent, geometry, multiple)
    assert torch.equal(result, crop_to_latent(arbitrary(padded, 0.5, multiple), geometry))
