import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import flux, flux_inputs, latents_of

import ddit_rt
from ddit_rt import DDiTConfig, ScheduleError
from ddit_rt.schedule import FixedSchedule, KnownEvolution, StepView, coarsest_below, make_policy


def choose(config, index, patch_std, steps=50, coarse=0, skipped=0, runs=2):
    """The choice of the policy of ``config`` at one step."""
    limit = config.max_consecutive_coarse
    evolution = KnownEvolution(patch_std, config.threshold) if patch_std else None
    view = StepView(index, steps, 0.5, coarse, skipped, runs, evolution)
    return make_policy(config, None if limit == "auto" else limit).choose(view)


stds = st.fixed_dictionaries({k: st.floats(0, 2) | st.just(math.nan) for k in (1, 2, 4)})


@given(stds, st.floats(0, 2))
def test_the_coarsest_multiple_below_the_threshold_wins(patch_std, threshold):
    chosen = coarsest_below(patch_std, threshold)
    smooth = [k for k in (2, 4) if patch_std[k] < threshold]
    assert chosen == max(smooth, default=1)
    assert choose(DDiTConfig(threshold=threshold, initial_full_steps=0), 5, patch_std) == chosen


def test_without_a_history_the_step_is_fine():
    assert choose(DDiTConfig(threshold=1e9), 0, {}) == 1


def test_equal_to_the_threshold_is_not_below():
    assert coarsest_below({1: 0.0, 2: 0.5, 4: 0.5}, 0.5) == 1


@given(st.integers(1, 4), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=20))
def test_max_coarse_run_limits_every_run_of_coarse_steps(limit, stds):
    config = DDiTConfig(threshold=0.5, max_consecutive_coarse=limit, initial_full_steps=0)
    run = 0
    for index, std in enumerate(stds):
        multiple = choose(config, index, {1: std, 2: std, 4: std}, coarse=run)
        run = run + 1 if multiple > 1 else 0
        assert run <= limit
        if std == 0.0 and multiple == 1:
            assert index >= limit  # full only because a run has just ended


def test_a_fixed_schedule_is_taken_as_it_is():
    config = DDiTConfig(schedule=[1, 2, 4, 4], max_consecutive_coarse=1)
    assert [choose(config, i, {}, coarse=i) for i in range(4)] == [1, 2, 4, 4]


def test_a_callable_gets_index_and_stds_and_cannot_change_the_record():
    seen = []

    def schedule(index, patch_std):
        seen.append((index, dict(patch_std)))
        patch_std.clear()
        return 2

    patch_std = {1: 0.1, 2: 0.2, 4: 0.3}
    assert choose(DDiTConfig(schedule=schedule), 7, patch_std) == 2
    assert seen == [(7, {1: 0.1, 2: 0.2, 4: 0.3})] and len(patch_std) == 3


@pytest.mark.parametrize("returned", [3, None, "2", 8, 2.0])
def test_a_callable_that_returns_something_else_is_named(returned):
    with pytest.raises(ScheduleError, match=f"returned {returned!r} for step 4"):
        choose(DDiTConfig(schedule=lambda index, patch_std: returned), 4, {})


def test_a_whole_number_of_numpy_becomes_an_int():
    assert type(choose(DDiTConfig(schedule=lambda index, patch_std: np.int64(2)), 0, {})) is int


def test_only_the_configs_multiples_are_allowed():
    with pytest.raises(ScheduleError, match="returned 4"):
        choose(DDiTConfig(multiples=(1, 2), schedule=lambda index, patch_std: 4), 0, {})


def test_the_length_of_a_fixed_schedule_is_checked():
    FixedSchedule((1, 2, 4)).start(3)
    make_policy(DDiTConfig(), None).start(3)
    make_policy(DDiTConfig(schedule=lambda index, patch_std: 1), None).start(3)
    with pytest.raises(ScheduleError, match="2 entries, this run has 3"):
        FixedSchedule((1, 2)).start(3)


class EverySecond:
    """A policy of one's own, as the guide shows it."""

    def __init__(self, multiple):
        self.multiple = multiple

    def start(self, steps):
        self.steps = steps

    def choose(self, step):
        return 1 if step.index < 2 or step.consecutive_coarse else self.multiple


def test_a_policy_of_ones_own_is_a_schedule():
    pipe, inputs = flux(), flux_inputs()
    policy = EverySecond(2)
    with ddit_rt.accelerated(pipe, schedule=policy):
        result = latents_of(pipe, inputs)
        assert ddit_rt.report(pipe).schedule == [1, 1, 2, 1, 2, 1, 2, 1] and policy.steps == 8
        assert "EverySecond" in ddit_rt.report(pipe).config["schedule"]
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 1, 2, 1, 2, 1]):
        assert torch.equal(latents_of(pipe, inputs), result)
    with ddit_rt.accelerated(pipe, schedule=EverySecond(3)), pytest.raises(ScheduleError, match="chose 3 for step 2"):
        latents_of(pipe, inputs)
