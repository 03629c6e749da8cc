"""Equal pictures, whose PSNR is infinite, count as 100 dB in every mean: one of them leaves the others their say."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from prompted import CALL, prompted

from ddit_rt.distill import validation
from ddit_rt.evaluate import Analysis, Misses
from ddit_rt.evaluate.metrics import PAIRED
from ddit_rt.fitting import calibrate, real_runs, threshold, try_schedule
from ddit_rt.schedule import PSNR_LIMIT, CallKey, Report, ScheduleStore, StepRecord
from ddit_rt.trajectories import limited_psnr


def frames(error):
    """A picture that is ``error`` away from the plain one: 20 dB for 0.1."""
    return torch.full((1, 3, 16, 16), error)


def run(error, missed=0.1):
    steps = [StepRecord(0, 0.0, 1.0, 1, 4), StepRecord(1, 0.0, 0.5, 1, 4, miss=torch.tensor(missed))]
    return SimpleNamespace(frames=frames(error), seconds=1.0, report=Report(steps, {}))


PLAIN = [run(0.0)] * 3
ERRORS = (0.1, 0.0, 0.0)
MEAN = pytest.approx((20 + 2 * PSNR_LIMIT) / 3, abs=1e-3)


def test_equal_pictures_have_the_limit():
    assert limited_psnr(frames(0.0), frames(0.0)) == PAIRED["psnr"]()(frames(0.0), frames(0.0)) == PSNR_LIMIT
    assert limited_psnr(frames(0.1), frames(0.0)) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize(("errors", "expected"), [(ERRORS, MEAN), ((0.0,) * 3, PSNR_LIMIT)])
def test_a_line_of_an_analysis(monkeypatch, errors, expected):
    monkeypatch.setattr(Report, "speedup_estimate", 1.0)
    monkeypatch.setattr(Analysis, "run", lambda self, label, settings: [run(error) for error in errors])
    line = Analysis(None, ["a", "b", "c"], {}, {}, _plain=PLAIN).line("x", {})
    assert line.psnr == expected, "100 dB is left to runs that are all equal: tables show no number then"


def test_misses():
    found = Misses.of(2.0, PLAIN, [run(error, 0.1 + i) for i, error in enumerate(ERRORS)])
    assert (found.psnr, found.psnr_high) == (MEAN, PSNR_LIMIT) and found.psnr_low == pytest.approx(20, abs=1e-3)


def made(generate, changed):
    """``generate`` with other pictures: equal ones for the prompt "a", 20 dB from the plain one for "b"."""

    def wrapped(pipe, settings, seed, **call):
        error = 0.1 if changed(settings) and call["prompt"] == "b" else 0.0
        return replace(generate(pipe, settings, seed, **call), frames=frames(error))

    return wrapped


def test_fits(monkeypatch):
    monkeypatch.setattr(threshold, "generate", made(threshold.generate, lambda settings: settings["threshold"] > 0))
    found = calibrate(prompted(), ["a", "b"], 1.3, trials=1, num_inference_steps=14, **CALL)
    assert found.psnr == pytest.approx(60, abs=1e-3)
    monkeypatch.setattr(real_runs, "generate", made(real_runs.generate, lambda settings: settings is not None))
    assert try_schedule(prompted(), [1, 1, 0], ["a", "b"], num_inference_steps=3, **CALL).psnr == pytest.approx(
        60, abs=1e-3
    )


def test_a_quality_beyond_the_limit_asks_for_the_very_same_picture(tmp_path):
    key = CallKey("0123456789abcdef", "Euler(shift=3)", 3, "none", 16, 1)
    store = ScheduleStore(tmp_path)
    equal = try_schedule(prompted(), [1, 1, 1], ["a"], num_inference_steps=3, **CALL)
    store.save(key, equal)
    assert store.find(key, quality=1000) == equal and equal.psnr == PSNR_LIMIT


def test_pictures_of_a_validation(monkeypatch, tmp_path):
    def generate(pipe, settings, seed, **call):
        return SimpleNamespace(frames=frames(0.1 if settings is not None and call["prompt"] == "b" else 0.0))

    monkeypatch.setattr(validation, "generate", generate)
    adapter = SimpleNamespace(spec=SimpleNamespace(multiples=(2,)))
    pipe, call = SimpleNamespace(vae=object()), {"num_inference_steps": 8}
    found = validation.pictures(pipe, adapter, call, ["a", "b"], tmp_path / "sheet.png", "direct")
    assert set(found) == {"psnr_db/forecast", "psnr_db/band-split@2p", "psnr_db/adapter@2p"}
    assert list(found.values()) == pytest.approx([60] * 3, abs=1e-3)
