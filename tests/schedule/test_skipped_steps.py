"""Steps without a model call: by schedule, by the policy, and what the report says of them."""

import pytest
import torch
from tiny import flux, flux_inputs, latents_of, negative, wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError, DDiTConfig, ScheduleError
from ddit_rt.granularity import PredictionHistory
from ddit_rt.schedule import KnownEvolution, StepView, choices_along, make_policy

CASES = [(flux, flux_inputs), (flux, lambda **k: negative(flux_inputs(**k))), (wan, wan_inputs)]


def test_forecast_is_the_line_through_the_last_two_predictions():
    trajectory = PredictionHistory()
    trajectory.recent.append((0.8, torch.tensor([1.0])))
    assert trajectory.forecast(0.1).item() == 1.0
    trajectory.recent.append((0.6, torch.tensor([2.0])))
    assert trajectory.forecast(0.5).item() == pytest.approx(2.5)
    assert trajectory.forecast(0.5, linear=False).item() == 2.0


@pytest.mark.parametrize("make, inputs", CASES, ids=["flux", "flux-cfg", "wan"])
def test_free_between_fine_steps_is_extrapolation(make, inputs):
    pipe, given = make(), inputs(steps=10)
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 0, 0, 1, 0, 0, 1, 0, 1], corrector=False):
        free = latents_of(pipe, given)
        report = ddit_rt.report(pipe)
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 2, 1, 2, 2, 1, 2, 1], coarse="extrapolate", corrector=False):
        assert torch.equal(latents_of(pipe, given), free)
    assert [step.executed for step in report.steps if step.multiple == 0] == ["cached"] * 5
    assert all(step.tokens == 0 and step.flops == 0 for step in report.steps if step.multiple == 0)
    assert report.speedup_estimate == pytest.approx(2.0)
    assert "5 skipped" in str(report)


@pytest.mark.parametrize("make, inputs", CASES, ids=["flux", "flux-cfg", "wan"])
def test_free_between_coarse_steps(make, inputs, tmp_path):
    pipe, given = make(), inputs(steps=9)
    schedule = [1, 1, 0, 2, 0, 4, 0, 1, 0]
    with ddit_rt.accelerated(pipe, schedule=schedule):
        result = latents_of(pipe, given)
        report = ddit_rt.report(pipe)
    assert report.schedule == schedule and torch.isfinite(result).all()
    assert report.plot(tmp_path / "plot.png").stat().st_size > 0
    with ddit_rt.accelerated(pipe, schedule=report.schedule):
        assert torch.equal(latents_of(pipe, given), result)


def test_first_step_cannot_be_free():
    pipe, given = flux(), flux_inputs(steps=4)
    with ddit_rt.accelerated(pipe, schedule=[0, 1, 1, 1]), pytest.raises(ScheduleError, match="first step"):
        latents_of(pipe, given)
    with ddit_rt.accelerated(pipe, schedule=lambda index, patch_std: 0):
        latents_of(pipe, given)
        assert ddit_rt.report(pipe).schedule == [1, 0, 0, 0]


def test_policy_makes_free_steps_below_a_share_of_the_threshold():
    policy = make_policy(
        DDiTConfig(threshold=0.5, skip_below=0.2, max_consecutive_skipped=2, initial_full_steps=0), None
    )
    smooth, middling, rough = ({1: s, 2: s, 4: s} for s in (0.01, 0.3, 0.9))

    def choose(index, patch_std, skipped=0, runs=2):
        evolution = KnownEvolution(patch_std, 0.5) if patch_std else None
        return policy.choose(StepView(index, 50, 0.5, 0, skipped, runs, evolution))

    assert choose(0, {}) == 1
    assert choose(1, smooth, runs=0) == 4
    assert choices_along(policy, [{}, *[smooth] * 4], 0.5)[1:] == [0, 0, 4, 0]
    assert choose(6, middling) == 4 and choose(7, rough) == 1
    assert choose(8, {1: 0.01, 2: 0.01, 4: 0.2}) == 4, "every size has to be smooth"


def test_free_steps_count_towards_the_longest_coarse_run():
    config = DDiTConfig(
        threshold=0.5, skip_below=0.2, max_consecutive_skipped=1, max_consecutive_coarse=3, initial_full_steps=0
    )
    smooth = {1: 0.01, 2: 0.01, 4: 0.01}
    assert choices_along(make_policy(config, 3), [smooth] * 6, 0.5) == [0, 4, 0, 1, 0, 4]


def test_free_steps_with_one_size_only():
    pipe, given = flux(), flux_inputs(steps=10)
    with ddit_rt.accelerated(pipe, multiples=(1,), threshold=1e9, skip_below=1.0, max_consecutive_skipped=2):
        latents_of(pipe, given)
        assert ddit_rt.report(pipe).schedule == [1, 1, 1, 0, 0, 1, 0, 0, 1, 0]


def test_initial_full_steps_leaves_the_first_steps_fine():
    policy = make_policy(DDiTConfig(threshold=0.5, initial_full_steps=5), None)
    assert choices_along(policy, [{1: 0.1, 2: 0.1, 4: 0.1}] * 7, 0.5) == [1, 1, 1, 1, 1, 4, 4]


@pytest.mark.parametrize(
    "bad", [{"skip_below": -1}, {"skip_below": "x"}, {"max_consecutive_skipped": 0}, {"initial_full_steps": -1}]
)
def test_config_errors(bad):
    with pytest.raises(ConfigError):
        DDiTConfig(**bad)


def test_schedules_still_refuse_unknown_multiples():
    with pytest.raises(ScheduleError, match="nor 0"):
        DDiTConfig(schedule=[1, 3])


@pytest.mark.parametrize(
    "schedule", [[1, 1, 1, 1, 0, 0, 0, 1], [1, 1, 2, 1, 2, 1, 0, 0], lambda i, _: int(i in (1, 7))]
)
def test_what_cannot_be_skipped_is_noted(schedule):
    """The second transformer of Wan 2.2 begins with a full step, whatever a schedule says, and so does a run."""
    pipe = wan(two=True)
    with ddit_rt.accelerated(pipe, schedule=schedule):
        latents_of(pipe, wan_inputs())
        steps = ddit_rt.report(pipe).steps
    asked = [schedule(i, None) if callable(schedule) else schedule[i] for i in range(8)]
    departures = [step for step, multiple in zip(steps, asked, strict=True) if step.multiple != multiple]
    assert departures and {step.note for step in departures} == {"no full step of this transformer to start from"}
    assert {step.note for step in steps if step not in departures} == {""}
