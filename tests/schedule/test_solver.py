"""The latent's way over skipped steps: exact where the prediction is a line or a parabola, else the scheduler's own."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from schedulers import FLOW, SCHEDULERS

from ddit_rt import ConfigError
from ddit_rt.schedule import FlowSolver, Ran, check_reference, schedule_of, solves_the_flow, step_with_increment

STEPS = 24
SHAPE = (2, 3, 4, 4)


def noise(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def polynomial(*coefficients):
    """v(σ), the same for every latent."""
    return lambda latent, sigma: sum(c * sigma**i for i, c in enumerate(coefficients)) * torch.ones(SHAPE)


def bent(latent, sigma):
    """A field that depends on the latent, as a model's does."""
    return torch.sin(2 * latent) * 0.6 + latent.roll(1, -1) * 0.3 + sigma**2


def plain(scheduler, field, latent=None, steps=STEPS):
    scheduler.set_timesteps(steps)
    latent = noise() if latent is None else latent
    for index, timestep in enumerate(scheduler.timesteps):
        output = field(latent.float(), float(scheduler.sigmas[index])).to(latent.dtype)
        latent = scheduler.step(output, timestep, latent, return_dict=False)[0]
    return latent


def solved(scheduler, field, kinds, converged=False, latent=None, sources=None):
    """A run with a prediction at the steps that ``kinds`` says, and the last one again at the others.

    Another source has a prediction of its own at once, also at a skipped step.
    """
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.tolist()
    solver = FlowSolver(scheduler, sigmas, converged)
    latent = noise() if latent is None else latent
    output = None
    for index, timestep in enumerate(scheduler.timesteps):
        kind = kinds[index]
        if kind is not Ran.SKIPPED or (sources and sources[index] != sources[index - 1]):
            output = field(latent.float(), sigmas[index]).to(latent.dtype)

        def own(sample, output=output, timestep=timestep):
            return step_with_increment(scheduler.step, scheduler, output, timestep, sample, return_dict=False)

        source = sources[index] if sources else 1
        result, increment = solver.step(index, kind, source, output, latent, own)
        assert increment.dtype == torch.float32
        latent = result[0]
    return latent, solver


def kinds_of(schedule):
    return [Ran.FULL if multiple else Ran.SKIPPED for multiple in schedule]


ONE_IN_THREE = kinds_of([1, 1, *([1, 0, 0] * 7), 1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_skipped_steps_the_scheduler_moves_the_latent_bit_for_bit(name):
    scheduler = SCHEDULERS[name]()
    wanted = plain(scheduler, bent)
    count = len(scheduler.timesteps)
    latent, _ = solved(scheduler, bent, [Ran.FULL] * count)
    assert count >= STEPS and torch.equal(latent, wanted)


@pytest.mark.parametrize("field", [polynomial(0.3, -0.8), polynomial(0.3, -0.8, 1.7)])
def test_gaps_come_to_the_sum_of_the_schedulers_own_steps(field):
    """Whatever was fed at skipped steps: a parabola through the ends is a parabola between them."""
    wanted = plain(SCHEDULERS["euler"](), field)
    found, _ = solved(SCHEDULERS["euler"](), field, ONE_IN_THREE)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_gaps_come_to_the_integral_where_the_converged_picture_is_meant():
    """0.3 + 1.7 σ integrates exactly from 1 to 0 at any spacing, which Euler's steps miss."""
    field, exact = polynomial(0.3, 1.7), noise() - (0.3 + 1.7 / 2)
    found, _ = solved(SCHEDULERS["euler"](), field, ONE_IN_THREE, converged=True)
    assert (found - exact).abs().max() < 1e-5 < 0.02 < (plain(SCHEDULERS["euler"](), field) - exact).abs().max()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_converged_run_ends_nearer_to_many_steps_than_the_schedulers_own(name):
    exact = plain(SCHEDULERS["euler"](), bent, steps=4000)
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    found, _ = solved(scheduler, bent, [Ran.FULL] * len(scheduler.timesteps), converged=True)
    euler = (plain(SCHEDULERS["euler"](), bent) - exact).square().mean()
    assert (found - exact).square().mean() < euler / 100


@pytest.mark.parametrize("name", ["unipc", "dpm", "heun"])
def test_other_solvers_hand_over_when_a_step_is_skipped(name):
    """Their histories would take forecasts for predictions."""
    exact = plain(SCHEDULERS["euler"](), bent, steps=4000)
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    kinds = kinds_of([1] * 6 + [int(i % 3 == 0) for i in range(len(scheduler.timesteps) - 7)] + [1])
    found, _ = solved(scheduler, bent, kinds)
    scheduler.set_timesteps(STEPS)
    fed, output = noise(), None
    for index, timestep in enumerate(scheduler.timesteps):
        output = bent(fed, float(scheduler.sigmas[index])) if kinds[index] is Ran.FULL else output
        fed = scheduler.step(output, timestep, fed, return_dict=False)[0]
    assert (found - exact).square().mean() * 10 < (fed - exact).square().mean()


def test_the_correction_is_worth_several_times_the_error():
    wanted = plain(SCHEDULERS["euler"](), bent)
    found, solver = solved(SCHEDULERS["euler"](), bent, ONE_IN_THREE)
    # without a correction: coarse runs get none
    begun = [Ran.FULL, Ran.FULL]
    uncorrected, _ = solved(
        SCHEDULERS["euler"](), bent, begun + [k if k is Ran.SKIPPED else Ran.COARSE for k in ONE_IN_THREE[2:]]
    )
    assert (found - wanted).square().mean() * 10 < (uncorrected - wanted).square().mean()
    assert solver.missed is not None and 0 < float(solver.missed) < 1


def test_no_line_leads_from_one_transformer_to_another():
    """The second transformer's predictions are far off the first's line, and the gap between belongs to the first."""

    def field(latent, sigma):
        return torch.full(SHAPE, 1.0 if sigma > 0.6 else 7.0)

    scheduler = SCHEDULERS["euler"]()
    scheduler.set_timesteps(STEPS)
    sources = [1 if sigma > 0.6 else 2 for sigma in scheduler.sigmas.tolist()[:-1]]
    switch = sources.index(2)
    kinds = [Ran.FULL if i in (0, 1, switch, switch + 1) else Ran.SKIPPED for i in range(STEPS)]
    latent, _ = solved(scheduler, field, kinds, sources=sources)
    torch.testing.assert_close(latent, plain(SCHEDULERS["euler"](), field), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("converged", [True, False])
def test_a_source_may_change_on_a_skipped_step(name, converged):
    """As where guidance ends amid skipped steps: its line is not followed beyond them."""

    def field(latent, sigma):
        return torch.full(SHAPE, 1.0 if sigma > 0.6 else 7.0)

    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    sources = [1 if sigma > 0.6 else 2 for sigma in scheduler.sigmas.tolist()[:-1]]
    switch = sources.index(2)
    kinds = [Ran.SKIPPED if switch - 3 < i < switch + 3 else Ran.FULL for i in range(STEPS)]
    levels = scheduler.sigmas.tolist()
    wanted = noise() + sum((b - a) * (1.0 if a > 0.6 else 7.0) for a, b in pairwise(levels))
    latent, _ = solved(scheduler, field, kinds, converged, sources=sources)
    torch.testing.assert_close(latent, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_leaves_is_kept(dtype):
    """In half precision many small steps would each be rounded; the remainder rides along."""
    field = polynomial(0.3, 1.7)
    start = noise(dtype)
    found, _ = solved(SCHEDULERS["euler"](), field, ONE_IN_THREE, converged=True, latent=start)
    assert found.dtype == dtype
    exact = start.float() - (0.3 + 1.7 / 2)
    # one rounding of the last latent, and the predictions' own
    assert (found.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype):
    for name in SCHEDULERS:
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(STEPS)
        kinds = kinds_of([1] * 6 + [int(i % 3 == 0) for i in range(len(scheduler.timesteps) - 6)])
        found, _ = solved(scheduler, bent, kinds, latent=noise(dtype))
        assert found.dtype == dtype and bool(torch.isfinite(found).all())


def test_schedulers_that_add_noise_have_no_converged_picture():
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    for scheduler in (stochastic, FlowMatchLCMScheduler(), UniPCMultistepScheduler(**FLOW)):
        known = solves_the_flow(scheduler)
        if known:
            check_reference("converged", scheduler)
            continue
        check_reference("plain", scheduler)
        with pytest.raises(ConfigError, match=r"reference='converged': FlowMatch.*reference='plain'"):
            check_reference("converged", scheduler)
    assert not solves_the_flow(stochastic) and not solves_the_flow(FlowMatchLCMScheduler())


def test_the_rule_for_full_steps_puts_more_of_them_at_high_noise():
    kinds = schedule_of(STEPS, 8, 1.4)
    assert sum(kinds) == 8 and sum(kinds[: STEPS // 2]) > 4
