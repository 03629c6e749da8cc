"""The latent's way over skipped steps: exact where the prediction is a line or a parabola, else the scheduler's own."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from schedulers import FLOW, SCHEDULERS

from ddit_rt import ConfigError
from ddit_rt.schedule import (
    FlowSolver,
    Ran,
    check_reference,
    place_evaluations,
    schedule_of,
    solver,
    solves_the_flow,
    step_with_increment,
    trust,
    way,
)

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


def solved(scheduler, field, kinds, toward=0.0, latent=None, sources=None):
    """A run with a prediction at the steps that ``kinds`` says, and the last one again at the others.

    Another source has a prediction of its own at once, also at a skipped step.
    """
    scheduler.set_timesteps(len(kinds) if scheduler.order == 1 else STEPS)
    sigmas = scheduler.sigmas.tolist()
    moved = FlowSolver(scheduler, sigmas, toward)
    latent = noise() if latent is None else latent
    output = None
    for index, timestep in enumerate(scheduler.timesteps):
        kind = kinds[index]
        if kind is not Ran.SKIPPED or (sources and sources[index] != sources[index - 1]):
            output = field(latent.float(), sigmas[index]).to(latent.dtype)

        def own(sample, output=output, timestep=timestep):
            return step_with_increment(scheduler.step, scheduler, output, timestep, sample, return_dict=False)

        source = sources[index] if sources else 1
        result, increment = moved.step(index, kind, source, output, latent, own)
        assert increment.dtype == torch.float32
        latent = result[0]
    return latent, moved


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


def test_gaps_come_to_the_sum_of_the_schedulers_own_steps():
    """Whatever was fed at skipped steps: a line through the ends is a line between them."""
    field = polynomial(0.3, -0.8)
    wanted = plain(SCHEDULERS["euler"](), field)
    found, _ = solved(SCHEDULERS["euler"](), field, ONE_IN_THREE)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_gaps_come_to_the_integral_where_the_converged_picture_is_meant():
    """0.3 + 1.7 σ integrates exactly over every gap but the last, which nothing corrects; Euler's steps miss it."""
    scheduler, field, last = SCHEDULERS["euler"](), polynomial(0.3, 1.7), noise() - (0.3 + 1.7 / 2)
    found, _ = solved(scheduler, field, ONE_IN_THREE, toward=1.0)
    left = 1.7 / 2 * float(scheduler.sigmas[-2]) ** 2  # over the last step, if the slope did not count at all
    assert (found - last).abs().max() < left < 0.02 < (plain(SCHEDULERS["euler"](), field) - last).abs().max()


@pytest.mark.parametrize("toward", [0.25, 0.6])
@pytest.mark.parametrize("kinds", [ONE_IN_THREE, [Ran.FULL] * STEPS], ids=["skipping", "full"])
def test_a_run_between_the_two_ends_so_far_from_each(kinds, toward):
    field = polynomial(0.3, 1.7, -0.9)
    plain_end, between, converged_end = (solved(SCHEDULERS["euler"](), field, kinds, aim)[0] for aim in (0, toward, 1))
    assert (plain_end - converged_end).abs().min() > 0.01
    torch.testing.assert_close(between, torch.lerp(plain_end, converged_end, toward), rtol=0, atol=1e-4)


def steps_of(count, one_in):
    """One full step in so many, the second one full too."""
    return [Ran.FULL if i % one_in == 0 or i == 1 else Ran.SKIPPED for i in range(count)]


@pytest.mark.parametrize(("one_in", "order"), [(1, 2.7), (2, 2.2), (3, 2.2)])
def test_a_converged_run_keeps_its_order(one_in, order):
    """Third where every gap is corrected, second over the last gap; slopes that count for less cost none of it."""
    exact, _ = solved(SCHEDULERS["euler"](), bent, [Ran.FULL] * 1500, toward=1.0)
    errors = []
    for count in (24, 48, 96):
        found, _ = solved(SCHEDULERS["euler"](), bent, steps_of(count, one_in), toward=1.0)
        errors.append(float((found - exact).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[2]) / 2 > order


@pytest.mark.parametrize("one_in", [2, 3])
def test_a_run_of_skipped_steps_comes_to_the_schedulers_own_in_second_order(one_in):
    errors = []
    for count in (24, 48, 96):
        found, _ = solved(SCHEDULERS["euler"](), bent, steps_of(count, one_in))
        errors.append(float((found - plain(SCHEDULERS["euler"](), bent, steps=count)).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[2]) / 2 > 2.2


def rough(latent, sigma):
    """A field whose slope over a few evaluations says nothing of what comes."""
    return torch.sin(40 * sigma + 6 * noise()) + 0.1 * latent


@pytest.mark.parametrize("converged", [False, True])
def test_with_few_evaluations_slopes_count_for_less(converged, monkeypatch):
    """Steps that took them whole would end farther off."""
    errors = []
    for span in (solver.SPAN, 1e9):
        monkeypatch.setattr(solver, "SPAN", span)
        kinds = kinds_of(schedule_of(STEPS, 6, 1.5))
        found, _ = solved(SCHEDULERS["euler"](), rough, kinds, toward=float(converged))
        wanted = plain(SCHEDULERS["euler"](), rough, steps=4000 if converged else STEPS)
        errors.append(float((found - wanted).square().mean()))
    assert errors[0] < errors[1] / 2


def test_how_far_a_slope_is_trusted():
    assert trust(0.0) == 1 and trust(solver.SPAN) == pytest.approx(0.5)
    assert 1 - trust(solver.SPAN / 20) == pytest.approx(1 / 400, rel=0.01), "falls with the square: no order is lost"
    ways = [way(u) for u in place_evaluations(10, 1.5)]
    assert ways == pytest.approx([j / 10 for j in range(10)]), "evaluations by the rule lie evenly"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_converged_run_ends_nearer_to_many_steps_than_the_schedulers_own(name):
    exact = plain(SCHEDULERS["euler"](), bent, steps=4000)
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    found, _ = solved(scheduler, bent, [Ran.FULL] * len(scheduler.timesteps), toward=1.0)
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
    found, moved = solved(SCHEDULERS["euler"](), bent, ONE_IN_THREE)
    # without a correction: coarse runs get none
    begun = [Ran.FULL, Ran.FULL]
    uncorrected, _ = solved(
        SCHEDULERS["euler"](), bent, begun + [k if k is Ran.SKIPPED else Ran.COARSE for k in ONE_IN_THREE[2:]]
    )
    assert (found - wanted).square().mean() * 5 < (uncorrected - wanted).square().mean()
    assert moved.missed is not None and 0 < float(moved.missed) < 1


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
    latent, _ = solved(scheduler, field, kinds, float(converged), sources=sources)
    torch.testing.assert_close(latent, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_leaves_is_kept(dtype):
    """In half precision many small steps would each be rounded; the remainder rides along."""
    field = polynomial(0.3, 1.7)
    start = noise(dtype)
    found, _ = solved(SCHEDULERS["euler"](), field, ONE_IN_THREE, toward=1.0, latent=start)
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


@pytest.mark.parametrize("name", ["unipc", "dpm", "heun"])
def test_only_eulers_steps_leave_a_way_to_the_converged_picture(name):
    check_reference("plain", SCHEDULERS["euler"](), 0.3)
    for scheduler in (SCHEDULERS[name](), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)):
        with pytest.raises(ConfigError, match=r"toward_converged=0.3: \w+ makes no Euler steps.*or leave it 0"):
            check_reference("plain", scheduler, 0.3)
        check_reference("plain", scheduler)


def test_the_rule_for_full_steps_puts_more_of_them_at_high_noise():
    kinds = schedule_of(STEPS, 8, 1.4)
    assert sum(kinds) == 8 and sum(kinds[: STEPS // 2]) > 4
