"""Wan 2.2's two transformers: a target counts what both need, and nothing of the first reaches the second."""

from itertools import pairwise

import pytest
import torch
from tiny import flux, latents_of, randomise, wan, wan_inputs

import ddit_rt
from ddit_rt import ScheduleError
from ddit_rt.families import family_of
from ddit_rt.integrations.acceleration import run_request
from ddit_rt.pipeline import identity_of
from ddit_rt.schedule import evaluation_steps, levels_of_steps, moved_levels, takeovers_of

STEPS = 24
RATIO = 0.6  # of the training timesteps, as tiny.wan has it


def run(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, **settings):
        return latents_of(pipe, inputs), ddit_rt.report(pipe)


def takeover_of(report):
    return next(step.index for step in report.steps if step.sigma < RATIO)


@pytest.mark.parametrize("reference", ["plain", "converged"])
@pytest.mark.parametrize("speedup", [1.5, 2, 3, 4, 6])
def test_a_target_is_reached_with_both_transformers(speedup, reference):
    pipe = wan(two=True, euler=True)
    _, report = run(pipe, wan_inputs(steps=STEPS), speedup=speedup, reference=reference)
    assert report.speedup_estimate == pytest.approx(STEPS / int(STEPS / speedup))
    takeover = takeover_of(report)
    assert report.schedule[takeover : takeover + 2] == [1, 1] and report.schedule[0] == 1


def test_a_speed_up_that_leaves_a_transformer_without_steps_is_refused():
    pipe = wan(two=True, euler=True)
    with pytest.raises(ScheduleError, match=r"has to keep 4, two of each transformer; ask for 6 at most"):
        run(pipe, wan_inputs(steps=STEPS), speedup=7)


def test_an_engines_request_that_leaves_one_without_steps_runs_plain():
    pipe, inputs = wan(two=True, euler=True), wan_inputs(steps=STEPS)
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, speedup=7):
        latents, told = run_request(pipe, None, STEPS, lambda: latents_of(pipe, inputs))
    assert not told["applied"] and "two of each transformer" in told["reason"]
    assert torch.equal(latents, plain)


def test_boundaries_are_those_between_transformers_that_are_there():
    two, one = wan(two=True), wan()
    assert family_of(two).boundaries(two) == (RATIO,)
    assert family_of(one).boundaries(one) == () == family_of(flux()).boundaries(flux())


def test_schedules_are_kept_for_a_boundary():
    pipe = wan(two=True)
    known = identity_of(pipe, family_of(pipe))
    assert identity_of(pipe, family_of(pipe)) == known
    pipe.register_to_config(boundary_ratio=0.7)
    assert identity_of(pipe, family_of(pipe)) != known


@pytest.mark.parametrize("schedule", [[1, 1, 0, 1, 0, 0], [1, 1, 2, 1, 2, 4], [1, 1, 1, 22, 0, 2]])
def test_nothing_of_the_first_transformer_reaches_the_second(schedule):
    """Two first transformers, and at the take-over one latent: whatever the second does after that is the same.

    By Euler's method: UniPC goes on from the first one's predictions in the plain pipeline, too.
    """
    ends = []
    for seed in (0, 5):
        pipe = wan(two=True, euler=True)
        randomise(pipe.transformer, seed)
        latent = torch.randn(1, 4, 2, 8, 12, generator=torch.Generator().manual_seed(3))

        def reset(pipe, index, timestep, tensors, latent=latent):
            following = pipe.scheduler.timesteps[index + 1 : index + 2]
            taken = timestep >= 1000 * RATIO and len(following) and following[0] < 1000 * RATIO
            return {"latents": latent.clone()} if taken else {}

        with ddit_rt.accelerated(pipe, schedule=schedule * 4, multiples=(1, 2, 4, 22)):
            made = latents_of(pipe, {**wan_inputs(steps=STEPS), "callback_on_step_end": reset})
            report = ddit_rt.report(pipe)
        takeover = takeover_of(report)
        assert report.schedule[takeover] and set(report.schedule[takeover:]) - {1}
        ends.append(made)
    assert torch.equal(*ends)


def test_evaluations_are_moved_to_a_take_over_and_none_is_added():
    for steps in (20, 28, 40, 50):
        for evaluations in range(5, steps + 1):
            for takeover in range(2, steps - 1):
                at = evaluation_steps(steps, evaluations, 1.65, (takeover,))
                assert len(at) == evaluations and list(at) == sorted(set(at)) and at[0] == 0
                assert {takeover, takeover + 1} <= set(at)


@pytest.mark.parametrize("evaluations", [4, 5, 8, 13, 25])
@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.5])
def test_moved_levels_keep_skipped_steps_with_the_transformer_before_them(evaluations, boundary):
    curve = [3 * (1 - i / 40) / (1 + 2 * (1 - i / 40)) for i in range(41)]
    levels = moved_levels(curve, evaluations, 1.65, (boundary,))
    assert len(levels) == 41 and all(high > low for high, low in pairwise(levels))
    (takeover,) = takeovers_of(levels[:-1], (boundary,))
    at = evaluation_steps(40, evaluations, 1.65, (takeover,))
    assert {takeover, takeover + 1} <= set(at)
    made, free = [levels[i] for i in at], moved_levels(curve, evaluations, 1.65)
    asked = [free[i] for i in evaluation_steps(40, evaluations, 1.65)]
    if sum(level < boundary for level in asked) >= 2:  # the evaluations lie where they would without a boundary
        assert made == asked
    assert sum(level < boundary for level in made) >= 2
    assert levels == levels_of_steps(40, at, made, 0, (boundary,))


def test_a_low_quality_leaves_both_transformers_their_steps():
    with ddit_rt.accelerated(wan(two=True), quality=15.0) as pipe:
        latents_of(pipe, wan_inputs())
        assert ddit_rt.report(pipe).schedule.count(1) >= 4
