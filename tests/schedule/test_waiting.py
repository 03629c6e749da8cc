"""When the host waits for the device: only where somebody asks for what the device still has to tell."""

import math

import pytest
from tiny import flux, flux_inputs, latents_of, smooth, wan, wan_inputs

import ddit_rt
from ddit_rt import StepRecord
from ddit_rt.schedule import PendingEvolution, ThresholdPolicy


@pytest.fixture
def waits(monkeypatch):
    """What has been waited for, in order: "decision" or "values"."""
    seen = []
    for name, what in (("decision", "decision"), ("wait", "values")):
        own = getattr(PendingEvolution, name)
        monkeypatch.setattr(PendingEvolution, name, lambda p, own=own, what=what: (seen.append(what), own(p))[1])
    return seen


@pytest.mark.parametrize(
    "settings", [{"schedule": [1, 1, 2, 4, 1, 2, 0, 1]}, {"initial_full_steps": 8}, {"multiples": (1,)}], ids=str
)
def test_steps_whose_outcome_is_fixed_wait_for_nothing(waits, settings):
    pipe = flux()
    with ddit_rt.accelerated(pipe, **settings):
        latents_of(pipe, flux_inputs())
        assert not waits
        steps = ddit_rt.report(pipe).steps
        watched = settings.get("multiples") != (1,)
        assert [bool(step.patch_std) for step in steps] == [watched and i > 2 for i in range(8)]
        assert bool(waits) == watched


def test_the_threshold_rule_waits_for_decisions_alone_and_only_where_it_has_a_choice(waits):
    pipe = smooth(flux())
    with ddit_rt.accelerated(pipe, threshold=1e9, max_consecutive_coarse=1, order=1, initial_full_steps=2):
        latents_of(pipe, flux_inputs())
        assert ddit_rt.report(pipe).schedule == [1, 1, 4, 1, 4, 1, 4, 1]
    assert waits == ["decision"] * 3


def test_a_policy_is_not_asked_about_a_step_that_has_to_be_full(monkeypatch):
    pipe, asked, own = wan(two=True), [], ThresholdPolicy.choose
    monkeypatch.setattr(ThresholdPolicy, "choose", lambda policy, step: asked.append(step.index) or own(policy, step))
    with ddit_rt.accelerated(pipe, threshold=1e9, order=1):
        latents_of(pipe, wan_inputs())
        forced = [step.index for step in ddit_rt.report(pipe).steps if step.note]
    assert forced and asked == [i for i in range(8) if i not in forced]


def test_what_is_read_late_is_read_once_and_kept():
    calls = []
    step = StepRecord(0, 1.0, 0.5, 2, 9, note="why")
    assert step.patch_std == {} and step.note == "why"
    step.patch_std = lambda: calls.append(1) or {2: math.inf}
    assert not calls
    assert step.patch_std == {2: math.inf} == step.to_dict()["patch_std"] and calls == [1]
