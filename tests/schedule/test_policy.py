import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt import DDiTConfig, ScheduleError
from ddit_rt.schedule import Policy, check_length, coarsest_below

stds = st.fixed_dictionaries({k: st.floats(0, 2) | st.just(math.nan) for k in (1, 2, 4)})


@given(stds, st.floats(0, 2))
def test_the_coarsest_multiple_below_the_threshold_wins(patch_std, threshold):
    chosen = coarsest_below(patch_std, threshold)
    smooth = [k for k in (2, 4) if patch_std[k] < threshold]
    assert chosen == max(smooth, default=1)
    assert Policy(DDiTConfig(threshold=threshold)).choose(5, patch_std) == chosen


def test_without_a_history_the_step_is_fine():
    assert Policy(DDiTConfig(threshold=1e9)).choose(0, {}) == 1


def test_equal_to_the_threshold_is_not_below():
    assert coarsest_below({1: 0.0, 2: 0.5, 4: 0.5}, 0.5) == 1


@given(st.integers(1, 4), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=20))
def test_max_coarse_run_limits_every_run_of_coarse_steps(limit, stds):
    policy = Policy(DDiTConfig(threshold=0.5, max_consecutive_coarse=limit))
    run = 0
    for index, std in enumerate(stds):
        multiple = policy.choose(index, {1: std, 2: std, 4: std})
        run = run + 1 if multiple > 1 else 0
        assert run <= limit
        if std == 0.0 and multiple == 1:
            assert index >= limit  # full only because a run has just ended


def test_a_fixed_schedule_is_taken_as_it_is_unless_the_step_must_be_fine():
    policy = Policy(DDiTConfig(schedule=[1, 2, 4, 4], max_consecutive_coarse=1))
    assert [policy.choose(i, {}) for i in range(3)] == [1, 2, 4]
    assert policy.choose(3, {}, must_be_full=True) == 1


def test_a_callable_gets_index_and_stds_and_cannot_change_the_record():
    seen = []

    def schedule(index, patch_std):
        seen.append((index, dict(patch_std)))
        patch_std.clear()
        return 2

    patch_std = {1: 0.1, 2: 0.2, 4: 0.3}
    assert Policy(DDiTConfig(schedule=schedule)).choose(7, patch_std) == 2
    assert seen == [(7, {1: 0.1, 2: 0.2, 4: 0.3})] and len(patch_std) == 3


@pytest.mark.parametrize("returned", [3, None, "2", 8, 2.0])
def test_a_callable_that_returns_something_else_is_named(returned):
    with pytest.raises(ScheduleError, match=f"returned {returned!r} for step 4"):
        Policy(DDiTConfig(schedule=lambda index, patch_std: returned)).choose(4, {})


def test_a_whole_number_of_numpy_becomes_an_int():
    assert type(Policy(DDiTConfig(schedule=lambda index, patch_std: np.int64(2))).choose(0, {})) is int


def test_only_the_configs_multiples_are_allowed():
    with pytest.raises(ScheduleError, match="returned 4"):
        Policy(DDiTConfig(multiples=(1, 2), schedule=lambda index, patch_std: 4)).choose(0, {})


def test_the_length_of_a_fixed_schedule_is_checked():
    check_length((1, 2, 4), 3)
    check_length(None, 3)
    check_length(lambda index, patch_std: 1, 3)
    with pytest.raises(ScheduleError, match="2 entries, this run has 3"):
        check_length((1, 2), 3)
