"""Calls that are watched, and calls with settings of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from specimens import SPECIMENS

import ddit_rt
from ddit_rt.pipeline import Progress, configured, find_accelerated, watched
from ddit_rt.schedule import FittedSchedule


def _run(pipe: Any, **more: Any) -> torch.Tensor:
    return pipe(**tiny.flux_inputs(height=32, width=32, **more)).images


def test_every_step_is_told_with_where_it_points_to() -> None:
    pipe = ddit_rt.accelerate(tiny.flux(), schedule=[1, 1, 0, 1, 2, 0, 1, 1])
    told: list[Progress] = []
    kept: list[torch.Tensor] = []

    def watch(step: Progress) -> None:
        clean = step.clean()
        assert clean is not None
        told.append(step)
        kept.append(clean)

    plain = _run(pipe)
    with watched(pipe, watch):
        seen = _run(pipe)
    assert torch.equal(plain, seen)
    assert [step.index for step in told] == list(range(8))
    assert [step.multiple for step in told] == [1, 1, 0, 1, 2, 0, 1, 1]
    assert {step.steps for step in told} == {8}
    geometry = find_accelerated(pipe).family.geometry(pipe, 32, 32)  # type: ignore[union-attr]
    assert all(c.shape == (1, geometry.channels, 1, geometry.height, geometry.width) for c in kept)
    told.clear()
    _run(pipe)
    assert not told


def test_the_last_step_of_a_flow_points_to_the_picture() -> None:
    pipe = ddit_rt.accelerate(tiny.flux(), threshold=0)
    last: list[torch.Tensor] = []
    with watched(pipe, lambda step: last.append(step.clean())):  # type: ignore[arg-type]
        latent = _run(pipe, output_type="latent")
    geometry = find_accelerated(pipe).family.geometry(pipe, 32, 32)  # type: ignore[union-attr]
    from ddit_rt.granularity import unpatchify

    expected = unpatchify(latent, geometry.patch, 1, *geometry.grid(1))
    torch.testing.assert_close(last[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_a_frame_that_the_scheduler_leaves_out_is_as_given(guided: bool) -> None:
    specimen = SPECIMENS["ltx2-image"]
    pipe = ddit_rt.accelerate(specimen.make(), schedule=specimen.schedule)
    kept: list[torch.Tensor] = []
    with watched(pipe, lambda step: kept.append(step.clean())):  # type: ignore[arg-type]
        latent = pipe(**specimen.arguments(guided=guided)).frames
    assert all(clean.shape == latent.shape for clean in kept)
    for clean in kept:
        torch.testing.assert_close(clean[:, :, :1], latent[:, :, :1].float())
    torch.testing.assert_close(kept[-1], latent.float(), rtol=1e-5, atol=1e-5)


def test_what_a_watcher_raises_ends_the_call_and_nothing_else() -> None:
    pipe = ddit_rt.accelerate(tiny.flux(), speedup=2)
    before = _run(pipe)

    def stop(step: Progress) -> None:
        if step.index == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"), watched(pipe, stop):
        _run(pipe)
    assert not ddit_rt.report(pipe).complete
    assert torch.equal(_run(pipe), before)


def test_a_call_may_have_a_target_of_its_own() -> None:
    pipe = ddit_rt.accelerate(tiny.flux(), speedup=2)
    plain, own = _run(tiny.flux()), _run(pipe)
    with configured(pipe, {"threshold": 0}):
        assert torch.equal(_run(pipe), plain)
    with configured(pipe, {"schedule": [1, 1, 0, 0, 1, 0, 0, 1]}):
        _run(pipe)
        assert ddit_rt.report(pipe).schedule == [1, 1, 0, 0, 1, 0, 0, 1]
    with configured(pipe, {"speedup": 4}):
        _run(pipe)
        assert ddit_rt.report(pipe).schedule.count(1) == 2
    with configured(pipe, {"reference": "converged"}):
        _run(pipe)
        assert ddit_rt.report(pipe).config["speedup"] == 2
    assert torch.equal(_run(pipe), own)


@pytest.mark.parametrize(
    "settings, text", [({"multiples": (1,)}, "multiples"), ({"speedup": 0.5}, "speedup"), ({"nothing": 1}, "nothing")]
)
def test_what_one_call_cannot_change_is_refused(settings: dict[str, Any], text: str) -> None:
    pipe = ddit_rt.accelerate(tiny.flux(), speedup=2)
    with pytest.raises(ddit_rt.DDiTError, match=text), configured(pipe, settings):
        pass
    with pytest.raises(ddit_rt.DDiTError, match="not accelerated"), configured(tiny.flux(), {}):
        pass


def test_the_file_of_a_schedule_is_that_schedule(tmp_path: Path) -> None:
    """However it is given, what is aimed at is the same."""
    for aim, beside in (("converged", {"toward_converged": 0.3}), ("plain", {"reference": "converged"})):
        fitted = FittedSchedule([1, 1, 0, 0, 1, 0, 0, 1], 2.0, 40.0, 4, reference=aim)
        pipe, runs = ddit_rt.accelerate(tiny.flux(), speedup=2, **beside), []
        for given in (fitted, str(fitted.save(tmp_path / f"{aim}.json"))):
            with configured(pipe, {"schedule": given}):
                runs.append(_run(pipe))
        assert torch.equal(*runs)


@pytest.mark.parametrize(
    "asked",
    [
        {"reference": "converged"},
        {"quality": 40},
        {"corrector": False},
        {"schedule": FittedSchedule([1, 1, 0, 0, 1, 0, 0, 1], 2.0, 40.0, 4, reference="converged")},
    ],
)
def test_a_calls_own_aim_takes_the_place_of_the_pipelines_share_of_the_way(asked: dict[str, Any]) -> None:
    plain, between = (ddit_rt.accelerate(tiny.flux(), speedup=2, toward_converged=share) for share in (0.0, 0.3))
    own, runs = _run(between), []
    for pipe in (plain, between):
        with configured(pipe, asked):
            runs.append(_run(pipe))
    assert torch.equal(*runs) and not torch.equal(runs[0], own)
    assert torch.equal(_run(between), own)


@pytest.mark.parametrize("settings", [{}, {"corrector": False}, {"reference": "converged"}, {"costs": "seconds"}])
def test_the_default_target_stays_where_a_call_changes_something_else(settings: dict[str, Any]) -> None:
    pipe = ddit_rt.accelerate(tiny.flux())
    with configured(pipe, settings):
        _run(pipe, steps=24)
        report = ddit_rt.report(pipe)
    assert report is not None and report.origin == "rule" and report.schedule.count(0) == 12
    with configured(pipe, settings):  # nobody asked for it: few steps stay full
        _run(pipe, steps=8)
        report = ddit_rt.report(pipe)
    assert report is not None and report.schedule == [1] * 8
