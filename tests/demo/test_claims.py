"""What the README says of the shipped model, at full length: 128 pixels, 50 steps, guidance."""

from __future__ import annotations

from typing import Any

import pytest

from ddit_rt.demo.pipeline import CALL_DEFAULTS, DEMO_PROMPTS, DEMO_THRESHOLD, load_pipeline
from ddit_rt.evaluate import generate, psnr

ONE_IN_FOUR = [1 if index < 7 or index % 4 == 1 else 2 for index in range(50)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_detailed_prompt_gets_more_fine_steps_at_one_threshold(pipe: Any) -> None:
    fine = {}
    for name in ("plain", "detailed"):
        outcome = generate(pipe, {"threshold": DEMO_THRESHOLD}, 0, **CALL_DEFAULTS, prompt=DEMO_PROMPTS[name])
        assert outcome.report is not None and outcome.report.speedup_estimate > 1.2
        fine[name] = outcome.report.schedule.count(1)
    assert fine["detailed"] > fine["plain"]


def test_delta_beats_naive_by_15_db_and_reuse_at_the_same_schedule_on_average(pipe: Any) -> None:
    quality: dict[str, list[float]] = {"delta": [], "naive": [], "reuse": []}
    for name in ("plain", "detailed"):
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        for seed in (0, 1):
            base = generate(pipe, None, seed, **call)
            for coarse, values in quality.items():
                settings = {"schedule": ONE_IN_FOUR, "coarse": coarse}
                values.append(psnr(generate(pipe, settings, seed, **call).frames, base.frames))
    means = {coarse: sum(values) / len(values) for coarse, values in quality.items()}
    assert means["delta"] > means["naive"] + 15
    assert means["delta"] > means["reuse"]
