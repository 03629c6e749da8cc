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
from ddit_rt.trajectories import generate_converged, psnr

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
            settings = {"schedule": SCHEDULE, "coarse": coarse, "corrector": False}
            runs = [generate(pipe, settings, seed, **call).frames for seed in SEEDS]
            mean[coarse] = sum(psnr(frames, plain[name, seed]) for frames, seed in zip(runs, SEEDS)) / len(SEEDS)
        assert mean["delta"] > mean["naive"] + 15, name
        assert mean["delta"] > mean["reuse"], name


@pytest.mark.parametrize(("speedup", "least"), [(2, 48.0), (3, 38.0)])
def test_a_target_finds_the_shipped_schedule_and_stays_near_to_plain(
    pipe: Any, plain: Frames, speedup: int, least: float
) -> None:
    for name in NAMES:
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        fast = generate(pipe, {"speedup": speedup}, 0, **call)
        assert fast.report is not None and fast.report.speedup_estimate >= speedup
        assert fast.report.kept == FittedSchedule.load(FITTED[speedup]), "what accelerate(speedup=...) takes"
        fewer = generate(pipe, None, 0, **{**call, "num_inference_steps": 50 // speedup})
        assert psnr(fast.frames, plain[name, 0]) > max(least, psnr(fewer.frames, plain[name, 0]) + 5), name


def test_the_converged_target_is_nearer_to_many_steps_than_plain_is(pipe: Any, plain: Frames) -> None:
    for name in NAMES:
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        converged = generate_converged(pipe, 0, **call).frames
        fast = generate(pipe, {"speedup": 2, "reference": "converged"}, 0, **call)
        assert fast.report is not None and fast.report.speedup_estimate >= 2
        assert psnr(fast.frames, converged) > psnr(plain[name, 0], converged) + 3, name
        between = generate(pipe, {"speedup": 3, "toward_converged": 0.3}, 0, **call)
        assert between.report is not None and between.report.speedup_estimate >= 3
        assert psnr(between.frames, converged) > psnr(plain[name, 0], converged) + 1, name
        assert psnr(between.frames, plain[name, 0]) > 40, name


def test_the_adapter_gains_in_the_schedule_fitted_to_it(pipe: Any, plain: Frames) -> None:
    trained = {"coarse": "adapter", "adapter": ADAPTER}
    gains = []
    for name in NAMES:
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        schedule = FittedSchedule.load(FITTED_ADAPTER[3]).schedule
        runs = [generate(pipe, {"schedule": schedule, **more}, 0, **call) for more in (trained, {})]
        assert runs[0].report is not None and runs[0].report.speedup_estimate > 2.95
        own, delta = (psnr(run.frames, plain[name, 0]) for run in runs)
        gains.append(own - delta)
    assert sum(gains) / len(gains) > 1
