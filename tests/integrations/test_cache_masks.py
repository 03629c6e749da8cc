"""Fitted schedules as masks of cache-dit, and as SGLang's variables for it."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from ddit_rt import FittedSchedule, ScheduleError
from ddit_rt.integrations import cache_mask, sglang_environment


def test_fitted_schedules_become_masks() -> None:
    fitted = FittedSchedule([1, 1, 1, 0, 0, 1, 0, 1], 1.6, 40.0, 2)
    assert cache_mask(fitted) == [1, 1, 1, 0, 0, 1, 0, 1]
    variables = sglang_environment(fitted)
    assert variables["SGLANG_CACHE_DIT_SCM_COMPUTE_BINS"] == "3,1,1"
    assert variables["SGLANG_CACHE_DIT_SCM_CACHE_BINS"] == "2,1"
    assert variables["SGLANG_CACHE_DIT_WARMUP"] == "3"


@pytest.mark.parametrize("schedule", [[1, 0], [1, 1, 0, 1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0]])
def test_cache_dit_reads_the_mask_back(schedule: list[int]) -> None:
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    variables = sglang_environment(FittedSchedule(schedule, 2.0, 40.0, 1))
    compute, cached = (
        [int(part) for part in variables[f"SGLANG_CACHE_DIT_SCM_{kind}_BINS"].split(",")]
        for kind in ("COMPUTE", "CACHE")
    )
    assert cache_dit.steps_mask(compute_bins=compute, cache_bins=cached, total_steps=len(schedule)) == schedule


def test_sglang_knows_the_variables() -> None:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("sglang is not installed")
    envs = importlib.import_module("sglang.multimodal_gen.envs")
    for name in sglang_environment(FittedSchedule([1, 0], 2.0, 40.0, 1)):
        assert name in envs.environment_variables, name


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        (FittedSchedule([1, 2, 0], 2.0, 40.0, 1), r"schedule\[1\]=2"),
        (FittedSchedule([1, 1], 1.0, 99.0, 1), "skips no step"),
        (FittedSchedule([1, 0], 2.0, 40.0, 1, [], [1.0, 0.5, 0.0], "converged"), "noise levels of its own"),
    ],
)
def test_schedules_that_no_mask_can_hold_are_refused(fitted: FittedSchedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        cache_mask(fitted)
