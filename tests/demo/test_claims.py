"""What the README says of the shipped model, at full length: 128 pixels, 50 steps, guidance."""

from __future__ import annotations

from typing import Any

import pytest

from ddit_rt.demo import (
    ADAPTER,
    CALL_DEFAULTS,
    DEMO_PROMPTS,
    DEMO_THRESHOLD,
    FITTED,
    FITTED_ADAPTER,
    load_pipeline,
)
from ddit_rt.evaluate import generate
from ddit_rt.schedule import FittedSchedule, one_in
from ddit_rt.trajectories import psnr

SCHEDULE = one_in(50, 3, 2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_detailed_prompt_gets_more_full_steps_at_one_threshold(pipe: Any) -> None:
    full = {}
    for name in ("plain", "detailed"):
        outcome = generate(pipe, {"threshold": DEMO_THRESHOLD}, 0, **CALL_DEFAULTS, prompt=DEMO_PROMPTS[name])
        assert outcome.report is not None and outcome.report.speedup_estimate > 1.2
        full[name] = outcome.report.schedule.count(1)
    assert full["detailed"] > full["plain"]


NAMES, SEEDS = ("plain", "detailed"), (0, 1)
Frames = dict[tuple[str, int], Any]


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Frames:
    """Frames of the plain pipeline by prompt and seed."""
    calls = {(name, seed): {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]} for name in NAMES for seed in SEEDS}
    return {key: generate(pipe, None, key[1], **call).frames for key, call in calls.items()}


def test_delta_beats_naive_by_15_db_and_reuse_at_the_same_schedule(pipe: Any, plain: Frames) -> None:
    for name in NAMES:
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        mean = {}
        for coarse in ("delta", "naive", "reuse"):
            settings = {"schedule": SCHEDULE, "coarse": coarse}
            runs = [generate(pipe, settings, seed, **call).frames for seed in SEEDS]
            mean[coarse] = sum(psnr(frames, plain[name, seed]) for frames, seed in zip(runs, SEEDS)) / len(SEEDS)
        assert mean["delta"] > mean["naive"] + 15, name
        assert mean["delta"] > mean["reuse"], name


def test_the_fitted_schedule_halves_the_flop_and_beats_half_the_steps(pipe: Any, plain: Frames) -> None:
    schedule = FittedSchedule.load(FITTED[2]).schedule
    for name in NAMES:
        base = plain[name, 0]
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        fast = generate(pipe, {"schedule": schedule}, 0, **call)
        assert fast.report is not None and fast.report.speedup_estimate > 1.95
        half = generate(pipe, None, 0, **{**call, "num_inference_steps": 25})
        assert psnr(fast.frames, base) > psnr(half.frames, base) + 10, name


def test_the_adapter_gains_in_the_schedule_fitted_to_it(pipe: Any, plain: Frames) -> None:
    trained = {"coarse": "adapter", "adapter": ADAPTER}
    gains = []
    for name in NAMES:
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        methods = ((FITTED_ADAPTER[3], trained), (FITTED[3], {}))
        runs = [generate(pipe, {"schedule": FittedSchedule.load(p).schedule, **more}, 0, **call) for p, more in methods]
        assert all(run.report is not None and run.report.speedup_estimate > 2.95 for run in runs)
        own, delta = (psnr(run.frames, plain[name, 0]) for run in runs)
        gains.append(own - delta)
    assert sum(gains) / len(gains) > 1
