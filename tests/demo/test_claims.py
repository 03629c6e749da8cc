"""What the README says of the shipped model, at full length: 128 pixels, 50 steps, guidance."""

from __future__ import annotations

from typing import Any

import pytest

from ddit_rt.demo.pipeline import CALL_DEFAULTS, DEMO_PROMPTS, DEMO_THRESHOLD, load_pipeline
from ddit_rt.evaluate import generate, psnr
from ddit_rt.evaluate.methods import one_in

SCHEDULE = one_in(50, 3, 2)


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


def test_delta_beats_naive_by_12_db_and_reuse_at_the_same_schedule_on_average(pipe: Any) -> None:
    quality: dict[str, list[float]] = {"delta": [], "naive": [], "reuse": []}
    for name in ("plain", "two", "detailed"):
        call = {**CALL_DEFAULTS, "prompt": DEMO_PROMPTS[name]}
        base = generate(pipe, None, 0, **call)
        for coarse, values in quality.items():
            settings = {"schedule": SCHEDULE, "coarse": coarse}
            values.append(psnr(generate(pipe, settings, 0, **call).frames, base.frames))
    means = {coarse: sum(values) / len(values) for coarse, values in quality.items()}
    assert means["delta"] > means["naive"] + 12
    assert means["delta"] > means["reuse"]
