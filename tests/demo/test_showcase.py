"""What the demo shows first: fitted schedules, before fixed spacing and the policy's own choice."""

from io import StringIO
from types import SimpleNamespace

import torch
from rich.console import Console

from ddit_rt.demo import DEMO_PROMPTS, FITTED, FITTED_ADAPTER, print_summary, showcase
from ddit_rt.schedule import FittedSchedule

STEPS = 50


def rows(tmp_path):
    """The rows of a run whose every picture is the same."""
    outcome = SimpleNamespace(
        frames=torch.zeros(1, 3, 4, 4), report=SimpleNamespace(speedup_estimate=2.0, steps=[None] * STEPS)
    )
    asked = {}

    def run(what, prompt, settings, offset=0, **call):
        asked[what.split(": ", 1)[1]] = (settings, call)
        return outcome

    run.seed = 0
    return showcase._baselines(run, tmp_path, STEPS, showcase._fitted(STEPS)), asked


def test_fitted_schedules_come_first_with_their_own_settings(tmp_path):
    found, asked = rows(tmp_path)
    names = list(found["rows"])
    fitted = [showcase.FITTED_ROW.format(s) for s in FITTED] + [
        showcase.FITTED_ADAPTER_ROW.format(s) for s in FITTED_ADAPTER
    ]
    assert names == [*fitted, *showcase.BASELINES, names[-1]]
    for speedup, path in FITTED.items():
        settings, _ = asked[showcase.FITTED_ROW.format(speedup)]
        assert settings == {"schedule": FittedSchedule.load(path).schedule}
    assert asked[names[-1]][1] == {"num_inference_steps": found["schedule"].count(1)}
    assert all(len(values["psnr"]) == 2 and len(values["pictures"]) == 2 for values in found["rows"].values())


def test_no_fitted_schedule_at_another_step_count():
    assert showcase._fitted(STEPS - 1) == {}


def test_the_first_table_is_led_by_fitted_schedules(tmp_path):
    entry = {
        "prompt": DEMO_PROMPTS["plain"], "seconds_plain": [2.0], "seconds_accelerated": [1.0],
        "speedup_wall_clock": 2.0, "speedup_flop": 2.5, "psnr": 41.0, "ssim": 0.99,
        "full_steps": 7, "tokens": [256] * STEPS,
    }  # fmt: skip
    result = {
        "steps": STEPS, "threshold": 2e-3, "page": "index.html", "sizes": [], "baselines": rows(tmp_path)[0],
        "prompts": {"plain": entry, "detailed": {**entry, "prompt": DEMO_PROMPTS["detailed"]}},
    }  # fmt: skip
    console = Console(width=200, record=True, file=StringIO())
    print_summary(result, console)
    text = console.export_text()
    at = [
        text.index(part)
        for part in ("fitted schedule, 2x", "delta (default", "plain pipeline, ", "τ = 0.002", "7 of 50")
    ]
    assert at == sorted(at)
