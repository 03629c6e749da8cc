"""``fit(costs="seconds")``: steps are timed, the search weighs them so, and what it finds is kept for such machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_fitting import a_flux, a_wan
from tiny import flux, flux_inputs
from typer.testing import CliRunner

from ddit_rt import ConfigError, FittedSchedule, accelerated, report
from ddit_rt.cli import app
from ddit_rt.errors import OutOfReachError
from ddit_rt.fitting import Fitter, fit_schedule, fitter, shares_by_clock
from ddit_rt.pipeline import find_accelerated, targets

SHARES = {2: 0.9, 4: 0.8, 0: 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitter, "shares_by_clock", lambda pipe, prompt, multiples, *_: dict(SHARES))


def test_steps_cost_what_they_take() -> None:
    """A block that takes its time, by the tokens that it gets: 64 at p, 16 at 2p, 4 at 4p."""
    pipe, naps = flux(), {64: 0.2, 16: 0.1, 4: 0.15}
    inputs = {name: value for name, value in flux_inputs().items() if "embeds" in name or name in ("height", "width")}

    def nap(module: Any, args: Any, kwargs: Any) -> None:
        time.sleep(naps[kwargs["hidden_states"].shape[1]])

    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(nap, with_kwargs=True)
    shares = shares_by_clock(pipe, inputs, (2, 4), 0, {}, {})
    assert find_accelerated(pipe) is None and shares.keys() == {2, 4, 0}
    assert shares[2] == pytest.approx(0.5, abs=0.2) and shares[4] == pytest.approx(0.75, abs=0.2)
    assert 0 < shares[0] < 0.3


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("reference", ["plain", "converged"])
def test_a_fit_by_the_clock_is_kept_for_calls_that_ask_for_it(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = a_flux()
    call = {**call, "num_inference_steps": 16}
    found = fit_schedule(pipe, ["a"], speedup=2, costs="seconds", reference=reference, **call)
    full, skipped = found.schedule.count(1), found.schedule.count(0)
    # at these costs a coarse step is never worth it
    assert full + skipped == 16 and full == 7 and found.speedup == pytest.approx(16 / 7)
    assert found.seconds_speedup == pytest.approx(16 / (full + 0.1 * skipped)) and found.seconds_speedup >= 2

    def runs(**settings: Any) -> FittedSchedule | None:
        with accelerated(pipe, speedup=2, reference=reference, **settings):
            pipe(**call, prompt="b", output_type="latent")
            return report(pipe).kept

    assert runs(costs="seconds") == found and runs() is None
    monkeypatch.setattr(targets, "describe_machine", lambda device: "another machine")
    assert runs(costs="seconds") is None


@pytest.mark.usefixtures("timed")
def test_coarse_steps_count_by_the_clock() -> None:
    pipe, call = a_wan()
    made = Fitter(pipe, ["a"], (1, 2, 4), costs="seconds", **call)
    assert made.error_model.shares == SHARES
    with pytest.raises(OutOfReachError, match=r"speedup=2: steps of the kinds 1, 2, 4 reach 1\.\d\d at most"):
        made.at_speedup(2)


def test_skipped_steps_that_are_not_free_limit_a_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitter, "shares_by_clock", lambda *_: {0: 0.5})
    pipe, call = a_flux()
    with pytest.raises(OutOfReachError, match=r"speedup=3: 12 steps have to keep 2; ask for 1\.71 at most"):
        fit_schedule(pipe, ["a"], speedup=3, kinds=(1, 0), costs="seconds", reference="converged", **call)


def test_costs_that_do_not_go_together_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitter, "measure", lambda *a, **k: pytest.fail("measured"))
    pipe, call = a_flux()
    for settings, message in (
        ({"costs": "dollars"}, "costs='dollars': use 'flops' or 'seconds'"),
        ({"costs": "seconds", "quality": 40}, "quality=40 and costs='seconds'"),
        ({"cost_ratios": {2: 0.1}, "quality": 40}, "quality=40 and cost_ratios"),
        ({"costs": "seconds", "cost_ratios": {2: 0.1}}, "costs='seconds' and cost_ratios"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_schedule(pipe, ["a"], **settings, **call)
    with pytest.raises(ConfigError, match=r"seconds_speedup=-1.0: a ratio of seconds"):
        FittedSchedule([1, 1], 1.0, 40.0, 1, seconds_speedup=-1.0)
    result = CliRunner().invoke(app, ["fit", "demo", "--costs", "dollars"])
    assert isinstance(result.exception, ConfigError) and "costs='dollars'" in str(result.exception)
