"""Schedules fitted to a pipeline: the measurements are those of real runs, and what is found is what runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import trained
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import flux, flux_inputs, picture, smooth, wan, wan_vae
from typer.testing import CliRunner

from ddit_rt import AdapterMismatchError, ConfigError, accelerated, report
from ddit_rt.cli import app
from ddit_rt.errors import OutOfReachError
from ddit_rt.fitting import (
    ErrorModel,
    Fitter,
    find_evaluations,
    find_schedule,
    fit_schedule,
    fitter,
    measure,
    measurement,
    try_schedule,
)
from ddit_rt.fitting.real_runs import RealRuns, unmeasured
from ddit_rt.granularity import PredictionHistory
from ddit_rt.pipeline import targets
from ddit_rt.runtime import MethodPatch
from ddit_rt.schedule import PSNR_LIMIT, FlowSolver, Ran, ScheduleStore, schedule_of
from ddit_rt.schedule.fitted import FittedSchedule
from ddit_rt.trajectories import adapter_errors, last_latent_with_error, record_trajectory

STEPS = 12


def _letters(prompt: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, prompt))))


def a_flux() -> tuple[Any, dict[str, Any]]:
    pipe = smooth(flux())
    pipe.encode_prompt = lambda prompt, *a, **k: (
        _letters(prompt, 1, 5, 24),
        _letters(prompt, 1, 12),
        torch.zeros(5, 3),
    )
    guidance = {"negative_prompt": "nothing", "true_cfg_scale": 2.0}
    return pipe, {"height": 64, "width": 64, "num_inference_steps": STEPS, **guidance}


def a_wan(two: bool = False) -> tuple[Any, dict[str, Any]]:
    pipe = wan(two=two, euler=True)
    pipe.encode_prompt = lambda prompt, *a, **k: (_letters(prompt, 1, 6, 16), -_letters(prompt, 1, 6, 16))
    pipe.check_inputs = lambda *a, **k: None
    size = {"height": 64, "width": 96, "num_frames": 5, "guidance_scale": 3.0}
    return pipe, {**size, "num_inference_steps": STEPS}


MODELS = {"flux": a_flux, "wan": a_wan}


def outputs_of(
    pipe: Any, schedule: list[int], prompt: str, call: dict[str, Any], **settings: Any
) -> list[torch.Tensor]:
    """Predictions as the scheduler gets them in a run by ``schedule``."""
    seen: list[torch.Tensor] = []

    def step(inner: Any, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output.clone())
        return inner(output, *args, **kwargs)

    with accelerated(pipe, schedule=schedule, **settings):
        patch = MethodPatch(pipe.scheduler, "step", step)
        patch.ensure_outermost()
        try:
            pipe(**call, prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="latent")
        finally:
            patch.remove()
    return seen


@pytest.mark.parametrize("kind", [0, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_one_step_is_foretold_as_it_runs(model: str, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step that is not full, first order is exact: the same guess as the pipeline's own."""
    monkeypatch.setattr(measurement, "_NUMBERS", 10**6)
    pipe, call = MODELS[model]()
    error_model = measure(pipe, ["a"], [2, 4], **call)
    # the forecast itself, before the next step corrects it
    error_model = replace(error_model, sensitivity=np.ones(STEPS), corrector=False)
    schedule = [1] * STEPS
    schedule[7] = kind
    full, other = (outputs_of(pipe, s, "a", call) for s in ([1] * STEPS, schedule))
    assert all(torch.equal(a, b) for a, b in zip(full[:7], other[:7]))
    step = float(error_model.sigmas[8] - error_model.sigmas[7])
    wanted = float((step * (other[7] - full[7])).square().mean())
    assert wanted > 0
    # sums of signed entries keep the mean square on average only
    assert error_model.error(schedule)[0] == pytest.approx(wanted, rel=0.35)
    sketch = measurement._Sketch(full[0].numel())
    trajectory = record_trajectory(pipe, 0, prompt="a", **call)
    difference = trajectory.canonical(other[7]) - trajectory.canonical(full[7])
    exact = float((step * sketch(difference)).square().mean())
    assert error_model.error(schedule)[0] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("schedule", ["110011001001", "101010010100", "100100010011"])
def test_corrected_gaps_are_foretold_as_the_solver_makes_them(schedule: str) -> None:
    """On a field that does not depend on the latent, first order is exact: the same error as in a run."""
    sigmas = np.linspace(1, 0, STEPS + 1) ** 1.3
    waves = np.random.default_rng(0).normal(size=(2, 5))
    field = [np.cos(4 * sigma * waves[0] + waves[1]).astype(np.float32) for sigma in sigmas]
    full = np.stack(field[:-1])[:, None]
    ones = np.ones(STEPS)
    error_model = ErrorModel(
        sigmas.astype(np.float32), full, {}, {}, ones, (0,) * STEPS, np.zeros(1), looks_aside=False
    )
    kinds = [int(kind) for kind in schedule]
    scheduler = FlowMatchEulerDiscreteScheduler()
    solver = FlowSolver(scheduler, sigmas.tolist(), 0.0)
    history, latent = PredictionHistory(), torch.zeros(1, 5)
    for t, kind in enumerate(kinds):
        if kind:
            history.add_run(sigmas[t], torch.tensor(field[t])[None])
        output, h = history.forecast(sigmas[t]), float(sigmas[t + 1] - sigmas[t])

        def own(sample: torch.Tensor, move: torch.Tensor = h * output) -> Any:
            return (sample + move,), move

        latent = solver.step(t, Ran.FULL if kind else Ran.SKIPPED, 1, output, latent, own)[0][0]
    plain = (np.diff(sigmas)[:, None] * np.stack(field[:-1])).sum(0)
    wanted = np.square(latent[0].numpy() - plain).mean()
    assert wanted > 1e-8 and error_model.error(kinds)[0] == pytest.approx(wanted, rel=1e-3)


def test_a_search_for_evaluations_finds_what_no_rule_has() -> None:
    """All bends of this field lie late, where the rule puts the fewest evaluations."""
    steps = 40
    sigmas = np.linspace(1, 0, steps + 1).astype(np.float32)
    field = np.tanh((sigmas[:-1, None, None] - 0.2) * 15 * np.array([1.0, 1.3, 0.8])).astype(np.float32)
    error_model = ErrorModel(sigmas, field, {}, {}, np.ones(steps), (0,) * steps, np.full(1, 1e-12))
    found = find_evaluations(error_model, 12)
    assert found.count(1) == 12 and found[0] == 1
    assert error_model.error(found)[0] * 10 < error_model.error(schedule_of(steps, 12, 1.4))[0]


@pytest.mark.parametrize("reference", ["plain", "converged"])
def test_what_was_fitted_is_what_later_calls_with_a_target_run(
    reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    pipe, call = a_flux()
    call = {**call, "num_inference_steps": 16}
    fitted = fit_schedule(pipe, ["a"], speedup=2, reference=reference, **call)
    assert fitted.reference == reference and fitted.speedup >= 2 * 0.97
    assert (fitted.psnr_converged is not None) is bool(fitted.sigmas) is (reference == "converged")
    arguments = {**call, "prompt": "a", "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    with accelerated(pipe, speedup=2, reference=reference):
        pipe(**arguments)
        assert report(pipe).kept == fitted and report(pipe).schedule == fitted.schedule
        pipe(**{**arguments, "num_inference_steps": 17})
        assert report(pipe).kept is None
        pipe(**{**arguments, "true_cfg_scale": 1.0})
        assert report(pipe).kept is None
    with accelerated(pipe, speedup=2, reference="plain" if fitted.sigmas else "converged"):
        pipe(**arguments)
        assert report(pipe).kept is None


def test_a_model_that_cannot_be_told_apart_goes_by_the_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under some offloading weights are nowhere to be read between calls."""
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    pipe, call = a_flux()
    call = {**call, "num_inference_steps": 16}
    fit_schedule(pipe, ["a"], speedup=2, kinds=(1, 0), **call)

    def nowhere(*modules: Any) -> str:
        raise ConfigError("the weights are on no device")

    monkeypatch.setattr(targets, "fingerprint", nowhere)
    with accelerated(pipe, speedup=2):
        pipe(**call, prompt="a", generator=torch.Generator().manual_seed(0), output_type="latent")
        assert report(pipe).kept is None and report(pipe).speedup_estimate == pytest.approx(2.0)
    assert "fitted schedules are not looked for: the weights are on no device" in caplog.text
    fit_schedule(pipe, ["a"], speedup=3, kinds=(1, 0), **call)
    assert "the schedule is not kept for later calls: the weights are on no device" in caplog.text


def test_a_user_without_a_home_is_served_by_the_rule_and_keeps_the_fit_in_hand(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container whose user is a bare number."""
    monkeypatch.setenv("DDIT_RT_CACHE", "~nobody-of-that-name/cache")
    pipe, call = a_flux()
    call = {**call, "num_inference_steps": 16}
    assert fit_schedule(pipe, ["a"], speedup=2, kinds=(1, 0), **call).speedup >= 2
    assert "the schedule is not kept for later calls" in caplog.text and "Set DDIT_RT_CACHE" in caplog.text
    with accelerated(pipe, speedup=2):
        pipe(**call, prompt="a", generator=torch.Generator().manual_seed(0), output_type="latent")
        assert report(pipe).kept is None and report(pipe).speedup_estimate == pytest.approx(2.0)
    assert "fitted schedules are not looked for" in caplog.text


def test_a_wanted_quality_is_reached_by_the_fewest_evaluations() -> None:
    pipe, call = a_flux()
    call = {**call, "num_inference_steps": 16}
    fitted = fit_schedule(pipe, ["a"], quality=45, keep=False, **call)
    assert fitted.psnr >= 45
    better = fit_schedule(pipe, ["a"], quality=fitted.psnr + 10, keep=False, **call)
    assert better.schedule.count(1) > fitted.schedule.count(1) and better.psnr >= fitted.psnr + 10
    equal = fit_schedule(pipe, ["a"], quality=1000, keep=False, **call)
    assert equal.psnr == PSNR_LIMIT and equal.schedule.count(1) > better.schedule.count(1)
    with pytest.raises(OutOfReachError, match=r"quality=1000: 8 full steps come to \d+\.\d dB here"):
        fit_schedule(pipe, ["a"], quality=1000, reference="converged", keep=False, **{**call, "num_inference_steps": 8})


def test_bad_targets_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = a_flux()
    monkeypatch.setattr(fitter, "measure", lambda *a, **k: pytest.fail("measured"))
    for settings, message in (
        ({"speedup": 2, "quality": 40}, "speedup=2 and quality=40"),
        ({"quality": -1}, "quality=-1"),
        ({"reference": "best"}, "reference='best'"),
        ({"reference": "converged", "kinds": (1, 2)}, "kinds="),
        ({"kinds": (2, 0)}, r"kinds=\[2, 0\]: a run begins with full steps; allow 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_schedule(pipe, ["a"], **settings, **call)


@pytest.mark.parametrize("model", MODELS)
def test_flop_are_foretold_as_they_are_counted(model: str) -> None:
    pipe, call = MODELS[model]()
    error_model = measure(pipe, ["a"], [2, 4], **call)
    schedule = [1, 1, 1, 0, 4, 2, 1, 4, 4, 0, 1, 2]
    outputs_of(pipe, schedule, "a", call)
    with accelerated(pipe, schedule=schedule):
        pipe(**call, prompt="a", generator=torch.Generator().manual_seed(0), output_type="latent")
        counted = report(pipe).speedup_estimate
    assert STEPS / error_model.cost(schedule) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_an_adapters_errors_are_those_of_its_runs(model: str) -> None:
    pipe, call = MODELS[model]()
    adapter = trained(pipe)
    trajectory = record_trajectory(pipe, 0, prompt="a", **call)
    found, share = adapter_errors(pipe, trajectory, adapter, 2, every=4)
    assert {key for key in found if key[0] < 8} == {(2, 1), (3, 2), (5, 1), (6, 2), (7, 3)}
    settings = {"coarse": "adapter", "adapter": adapter}
    # up to its first coarse step a run is on the trajectory
    schedule = [1, 1, 2] + [1] * (STEPS - 3)
    runs = outputs_of(pipe, schedule, "a", call, **settings), outputs_of(pipe, [1, 1, 0, *schedule[3:]], "a", call)
    wanted = [float((run[2] - trajectory.outputs[2]).square().mean()) for run in runs]
    assert found[2, 1] == pytest.approx(wanted, rel=1e-4) and min(wanted) > 0
    with accelerated(pipe, schedule=schedule, **settings):
        pipe(**call, prompt="a", generator=torch.Generator().manual_seed(0), output_type="latent")
        step = report(pipe).steps[2]
    assert share == pytest.approx(step.flops / step.full_flops, rel=1e-6)


def test_what_an_adapter_leaves_is_drawn_between_the_steps_that_were_measured() -> None:
    found = [{(2, 1): (1.0, 4.0), (3, 2): (9.0, 9.0)}, {(2, 1): (3.0, 12.0), (6, 1): (4.0, 4.0)}]
    table = measurement._adapter_residual(found, 8)
    assert table.shape == (8, 2) and table[:, 1] == pytest.approx([1.0] * 8)
    assert table[:, 0] == pytest.approx([0.5, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0])


def test_search_takes_an_adapter_for_what_it_makes_good() -> None:
    every = set(range(0, 20, 2))
    plain = planted(every)
    skipped = find_schedule(plain, 3.0, (1, 0))

    def with_residual(share: float) -> ErrorModel:
        return replace(plain, adapter_residual={4: np.full((20, 3), share, np.float32)}, probes=False)

    good, bad = (find_schedule(with_residual(share), 3.0, (1, 4, 0)) for share in (0.1, 1.0))
    assert 4 in good and with_residual(0.1).error(good)[0] < plain.error(skipped)[0] / 2
    assert bad.count(4) < good.count(4)
    one = [1] * 10 + [4] + [1] * 9
    as_skipped = [0 if k == 4 else k for k in one]
    assert with_residual(0.1).error(one)[0] == pytest.approx(plain.error(as_skipped)[0] / 100, rel=1e-3)
    # no probes; and out of reach nothing is made good
    assert with_residual(0.1).cost(one) == pytest.approx(19.1)
    far = [1] * 10 + [0, 0, 0, 4] + [1] * 6
    assert with_residual(0.1).error(far)[0] == pytest.approx(plain.error([0 if k == 4 else k for k in far])[0])


def test_fit_with_trained() -> None:
    pipe, call = a_flux()
    adapter = trained(pipe, multiples=(4,))
    found = fit_schedule(pipe, ["a"], 1.5, (1, 4, 0), adapter=adapter, **call)
    settings = {"coarse": "adapter", "adapter": adapter, "multiples": (1, 4)}
    again = try_schedule(pipe, found.schedule, ["a"], 0, lambda text: None, settings, **call)
    assert (again.speedup, again.psnr) == (found.speedup, found.psnr)
    with pytest.raises(AdapterMismatchError, match="the adapter has no 2"):
        fit_schedule(pipe, ["a"], 1.5, (1, 2, 0), adapter=adapter, **call)
    assert "forward" not in pipe.transformer.__dict__


def test_a_run_from_the_trajectory_is_the_run_and_costs_only_what_comes_after() -> None:
    pipe, call = a_flux()
    trajectory = record_trajectory(pipe, 0, prompt="a", **call)
    calls = []
    patch = MethodPatch(pipe.transformer, "forward", lambda inner, *a, **k: calls.append(1) or inner(*a, **k))
    patch.ensure_outermost()
    last = last_latent_with_error(pipe, trajectory, 8, torch.zeros_like(trajectory.outputs[8]))
    patch.remove()
    assert torch.equal(last, trajectory.latents[-1])
    assert len(calls) == 2 * (STEPS - 9)  # guidance: two calls per step
    moved = last_latent_with_error(pipe, trajectory, 8, torch.ones_like(trajectory.outputs[8]))
    assert not torch.equal(moved, last)


def test_two_transformers_each_begin_with_two_full_steps() -> None:
    pipe, call = a_wan(two=True)
    error_model = measure(pipe, ["a"], [2], **call)
    change = error_model.transformers.index(1)
    assert 0 < change < STEPS
    full = {t for t in range(STEPS) if error_model.must_be_full(t)}
    assert full == {0, 1, change, change + 1}
    schedule = find_schedule(error_model, 1.3, (1, 2, 0))
    assert all(schedule[t] == 1 for t in full)
    outputs_of(pipe, schedule, "a", call)


@pytest.mark.parametrize("reference", ["plain", "converged"])
def test_a_fit_for_two_transformers_costs_what_it_says_and_leaves_work_to_both(reference: str) -> None:
    pipe, call = a_wan(two=True)
    pipe.vae = wan_vae()
    found = fit_schedule(pipe, ["a"], 2, (1, 0), reference=reference, keep=False, **call)
    with accelerated(pipe, schedule=found):
        pipe(prompt="a", output_type="latent", generator=torch.Generator().manual_seed(0), **call)
        made = report(pipe)
    takeover = next(step.index for step in made.steps if step.sigma < pipe.config.boundary_ratio)
    assert found.schedule[takeover] == 1 and made.schedule == list(found.schedule)
    assert sum(found.schedule) == STEPS // 2


def planted(kinks: set[int], steps: int = 20) -> ErrorModel:
    """Predictions on a straight line over σ, but for jumps at ``kinks``; the coarse model knows of the jumps."""
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    values = np.cumsum([1.0 if t in kinks else 0.0 for t in range(steps)]) - 3 * sigmas[:-1]
    full = np.repeat(values[:, None, None], 4, axis=2).astype(np.float32)
    one = np.ones(steps)
    floor = np.array([1e-8])
    return ErrorModel(sigmas, full, {4: full + 0.5}, {4: 0.1}, one, (0,) * steps, floor, corrector=False)


def test_search_leaves_out_what_a_line_foretells() -> None:
    error_model = planted(set())
    schedule = find_schedule(error_model, 2.5, (1, 0))
    assert schedule.count(1) <= 8 and error_model.error(schedule)[0] < 1e-8


def test_search_spends_its_steps_where_lines_fail() -> None:
    kinks = {6, 12}
    error_model = planted(kinks)
    schedule = find_schedule(error_model, 2.0, (1, 0))
    assert all(schedule[t] == 1 for t in kinks) and schedule.count(1) <= 10
    assert error_model.error(schedule)[0] < error_model.error([1, 1] + [1, 0] * 9)[0] / 10


def test_search_takes_coarse_steps_that_know_what_lines_do_not() -> None:
    every = set(range(0, 20, 2))
    error_model = planted(every)
    skipped, mixed = find_schedule(error_model, 3.0, (1, 0)), find_schedule(error_model, 3.0, (1, 4, 0))
    assert 4 in mixed and error_model.error(mixed)[0] < error_model.error(skipped)[0] / 10
    assert error_model.cost(mixed) <= 20 / 3 + 1e-6


def test_search_where_errors_grow_is_fine() -> None:
    error_model = planted(set(np.random.default_rng(0).permutation(20)[:10].tolist()))
    early = np.where(np.arange(20) < 8, 100.0, 1.0)
    even = find_schedule(error_model, 1.6, (1, 0))
    weighted = find_schedule(replace(error_model, sensitivity=early), 1.6, (1, 0))
    assert weighted[:8].count(0) < even[:8].count(0) and 0 in weighted[8:]


def test_what_no_schedule_reaches_is_refused_with_what_is_reached() -> None:
    error_model = planted(set())
    with pytest.raises(ConfigError, match=r"speedup=20: steps of the kinds 1, 4 reach 5.00 at most"):
        find_schedule(error_model, 20.0, (1, 4))
    with pytest.raises(ConfigError, match=r"speedup=1"):
        find_schedule(error_model, 1.0)


def test_fit_finds_runs_and_keeps(tmp_path: Path) -> None:
    pipe, call = a_flux()
    found = fit_schedule(pipe, ["a", "b"], 1.8, **call)
    assert len(found.schedule) == STEPS and 1.75 < found.speedup < 3 and found.prompts == 2
    assert len(found.sensitivity) == STEPS and min(found.sensitivity) > 0
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__
    every_other = [1, 1, *[0, 1] * 5]
    baseline = try_schedule(pipe, every_other, ["a", "b"], **call)
    assert baseline.speedup < found.speedup and found.psnr > baseline.psnr - 3
    assert FittedSchedule.load(found.save(tmp_path / "s.json")) == found


def test_real_runs_choose_between_mixed_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = a_flux()
    mixed, skipped = [1, 1, *[4] * (STEPS - 2)], [1, 1, *[0, 1] * 5]
    monkeypatch.setattr(fitter, "find_schedule", lambda error_model, speedup, kinds: mixed)
    for name in ("find_evaluations", "schedule_of"):
        monkeypatch.setattr(fitter, name, lambda *a: skipped)
    better = max((mixed, skipped), key=lambda s: try_schedule(pipe, s, ["a"], **call).psnr)
    assert fit_schedule(pipe, ["a"], 1.5, **call).schedule == better
    assert fit_schedule(pipe, ["a"], 1.5, (1, 2, 4), **call).schedule == mixed


@pytest.mark.parametrize("reference", ["plain", "converged"])
def test_the_rule_is_among_what_runs_for_real(monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    pipe, call = a_flux()
    tried: list[tuple[list[FittedSchedule], FittedSchedule | None]] = []
    original = RealRuns.best
    monkeypatch.setattr(RealRuns, "best", lambda runs, *given: tried.append(given) or original(runs, *given))
    fit_schedule(pipe, ["a"], 3.0, reference=reference, keep=False, **call)
    ((candidates, rule),) = tried
    with accelerated(pipe, speedup=3, reference=reference):
        pipe("a", **call)
        wanted = report(pipe)
    assert rule in candidates and rule is not None
    assert rule.schedule == [int(kind) for kind in wanted.schedule]
    if reference == "converged":
        levels = [(step.sigma, at) for step, at in zip(wanted.steps, rule.sigmas) if step.multiple == 1]
        assert len(levels) == 4 and all(sigma == pytest.approx(at, abs=0.02) for sigma, at in levels)


def test_with_an_adapter_real_runs_choose_among_three(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = a_flux()
    adapter = trained(pipe)
    found = {"adapter": [1, 1, *[4] * (STEPS - 2)], "delta": [1, 1, *[2, 1] * 5], "skipped": [1, 1, *[0, 1] * 5]}

    def search_for(error_model: ErrorModel, speedup: float, kinds: tuple[int, ...]) -> list[int]:
        assert not error_model.probes
        return found["adapter" if error_model.adapter_residual else "delta"]

    monkeypatch.setattr(fitter, "find_schedule", search_for)
    for name in ("find_evaluations", "schedule_of"):
        monkeypatch.setattr(fitter, name, lambda *a: found["skipped"])
    settings = {"coarse": "adapter", "adapter": adapter}
    runs = [try_schedule(pipe, s, ["a"], 0, lambda text: None, settings, **call) for s in found.values()]
    best = max(runs, key=lambda run: run.psnr)
    assert fit_schedule(pipe, ["a"], 1.5, adapter=adapter, **call).schedule == best.schedule


def test_a_fit_may_count_cost_as_at_another_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    pipe, call = a_wan()
    pipe.register_modules(vae=wan_vae())
    ratios = {2: 0.12, 4: 0.02}
    found = Fitter(pipe, ["a"], (1, 2, 4), cost_ratios=ratios, **call)
    own = measure(pipe, ["a"], **call)
    assert found.error_model.shares == ratios and own.shares[2] > 0.12
    schedule = found.at_speedup(3).schedule
    assert found.error_model.cost(schedule) <= STEPS / 3 < own.cost(schedule)
    assert found.measured(schedule).speedup == pytest.approx(STEPS / own.cost(schedule), rel=0.02), "of its own FLOP"
    fitted = fit_schedule(pipe, ["a"], 3, (1, 2, 4), cost_ratios=ratios, **call)
    assert fitted.schedule == schedule and fitted.sensitivity and not list(tmp_path.rglob("*.json")), "it is not kept"
    for wrong, match in (
        ({3: 0.1}, "3 is none of the coarse multiples 2, 4"),
        ({2: 1.5}, "2 costs 1.5 of a full step"),
    ):
        with pytest.raises(ConfigError, match=match):
            fit_schedule(pipe, ["a"], 3, cost_ratios=wrong, **call)
    with pytest.raises(ConfigError, match="leave out one"):
        fit_schedule(pipe, ["a"], quality=30, cost_ratios=ratios, **call)


def test_bad_requests_name_the_value(tmp_path: Path) -> None:
    pipe, call = a_flux()
    with pytest.raises(ConfigError, match=r"kinds=.*3 is none of"):
        fit_schedule(pipe, ["a"], kinds=(1, 3), **call)
    with pytest.raises(ConfigError, match="speedup=1"):
        fit_schedule(pipe, ["a"], 1.0, **call)
    with pytest.raises(ConfigError, match="no prompts"):
        fit_schedule(pipe, [], **call)
    with pytest.raises(ConfigError, match="num_inference_steps=3"):
        fit_schedule(pipe, ["a"], **{**call, "num_inference_steps": 3})
    with pytest.raises(ConfigError, match=r"toward_converged=0.3: no argument of fit, nor of FluxPipeline"):
        fit_schedule(pipe, ["a"], toward_converged=0.3, **call)
    with pytest.raises(ConfigError, match="no such file"):
        FittedSchedule.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"steps": 3}')
    with pytest.raises(ConfigError, match="not what `ddit-rt fit` writes"):
        FittedSchedule.load(tmp_path / "other.json")
    assert "forward" not in pipe.transformer.__dict__


def test_the_commands_fit_and_generate(tmp_path: Path) -> None:
    runner, path = CliRunner(), tmp_path / "s.json"
    size = ["--height", "64", "--width", "64", "--steps", "8", "--device", "cpu"]
    fitted = runner.invoke(
        app,
        ["fit", "demo", "--speedup", "1.5", "--count", "1", "--output", str(path), "--json", *size],
        catch_exceptions=False,
    )
    assert fitted.exit_code == 0, fitted.output
    schedule = json.loads(path.read_text())["schedule"]
    done = runner.invoke(
        app,
        ["generate", "demo", "a star", "--output", str(tmp_path / "a.png"), "--schedule", str(path), "--json", *size],
        catch_exceptions=False,
    )
    assert [step["multiple"] for step in json.loads(done.stdout)["report"]["steps"]] == schedule


# -- prompts without text encoders ------------------------------------------------------------------------------------


def _embedded(prompt: str) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": _letters(prompt, 1, 5, 24), "pooled_prompt_embeds": _letters(prompt, 1, 12)}


def test_prompts_may_be_what_stands_for_them() -> None:
    pipe, call = a_flux()
    call = {name: value for name, value in call.items() if name not in ("negative_prompt", "true_cfg_scale")}
    told: list[str] = []
    by_text = fit_schedule(pipe, ["a", "b"], speedup=2.0, keep=False, **call)
    del pipe.encode_prompt
    given = [_embedded("a"), _embedded("b")]
    assert fit_schedule(pipe, given, speedup=2.0, keep=False, progress=told.append, **call) == by_text
    assert "plain run: prompt 1" in told


@pytest.mark.parametrize(
    ("prompt", "match"), [(3, "prompts hold a int"), ({"generator": torch.Generator()}, "'generator'")]
)
def test_prompts_that_are_none_are_refused_before_anything_runs(prompt: Any, match: str) -> None:
    pipe, call = a_flux()
    told: list[str] = []
    with pytest.raises(ConfigError, match=match):
        fit_schedule(pipe, ["a", prompt], speedup=2.0, keep=False, progress=told.append, **call)
    assert not told


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 40}, r"prompts: 'b' makes latents .* \(1, 4, 1, 16, 10\), 'a' of \(1, 4, 1, 16, 16\)"),
        ({"num_images_per_prompt": 2}, r"prompts: 'b' makes latents .* \(2, 4, 1, 16, 16\), 'a' of \(1, "),
        ({"sigmas": np.linspace(0.9, 0.1, STEPS).tolist()}, r"'b' has other noise levels \(12 steps from 0\.9"),
        ({"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2]}, r"levels \(5 steps from 1\) than 'a' \(12 steps from 1\)"),
    ],
)
def test_prompts_that_differ_in_size_or_noise_are_refused_by_name(other: dict[str, Any], message: str) -> None:
    pipe, call = a_flux()
    told: list[str] = []
    with pytest.raises(ConfigError, match=message):
        fit_schedule(pipe, ["a", {"prompt": "b", **other}], speedup=2.0, keep=False, progress=told.append, **call)
    assert told[-1] == "plain run: b", "more was measured"


def test_a_picture_on_its_side_is_of_one_size() -> None:
    pipe, call = a_flux()
    upright, lying = ({"prompt": "a", "height": h, "width": w} for h, w in ((64, 32), (32, 64)))
    assert fit_schedule(pipe, [upright, lying], speedup=2.0, keep=False, **call).prompts == 2


def test_runs_from_a_picture_are_fitted_at_the_steps_that_they_make() -> None:
    pipe = smooth(flux("image"))
    prompt = _embedded("a") | {"image": picture(), "strength": 0.5}
    call = {"height": 64, "width": 64, "num_inference_steps": 2 * STEPS}
    found = fit_schedule(pipe, [prompt], speedup=1.5, keep=False, **call)
    assert len(found.schedule) == STEPS and found.speedup >= 1.4
    by_quality = fit_schedule(pipe, [prompt], quality=20.0, keep=False, **call)
    assert len(by_quality.schedule) == STEPS and by_quality.psnr >= 20
    with pytest.raises(ConfigError, match=r"strength=1\.0"):
        fit_schedule(pipe, [prompt], reference="converged", keep=False, **call)


@pytest.mark.parametrize(
    ("by_rule", "by_search", "taken"),
    [
        ([36.0, 35.0, 41.0, 38.0], [30.0, 41.0, 35.0, 45.0], "rule"),  # nearer in the mean, by less than chance
        ([30.0, 40.5, 34.0, 44.0], [31.0, 41.5, 34.8, 44.9], "search"),
        ([30.0, 40.5, 34.0, 44.0], [29.0, 39.0, 33.0, 43.0], "rule"),
    ],
)
def test_the_rule_stays_unless_a_search_is_nearer_by_more_than_chance(monkeypatch, by_rule, by_search, taken) -> None:
    rule = replace(unmeasured([1, 1, 0, 1]), psnr=float(np.mean(by_rule)))
    search = replace(unmeasured([1, 0, 1, 1]), psnr=float(np.mean(by_search)))
    values = {tuple(rule.schedule): by_rule, tuple(search.schedule): by_search}
    runs = RealRuns(None, ["a", "b", "c", "d"], 0, print, {}, "plain", {})
    monkeypatch.setattr(runs, "_tried", lambda one: (one, values[tuple(one.schedule)]))
    assert runs.best([search, rule], rule) == {"rule": rule, "search": search}[taken]
    assert runs.best([search, rule]) == (search if sum(by_search) > sum(by_rule) else rule)


@pytest.mark.parametrize("own", [{"strength": 1.0}, {"sigmas": [1 - (i / 12) ** 1.5 for i in range(12)]}])
def test_a_fit_says_where_its_schedule_is_not_kept(own, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    given = {name: flux_inputs()[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    pipe = flux("image") if "strength" in own else flux()
    prompt = {**given, "image": picture()} if "strength" in own else given
    call = {"num_inference_steps": 12, "height": 64, "width": 64, **own}
    fit_schedule(pipe, [prompt], speedup=2, kinds=(1, 0), **call)
    assert "is not kept for later calls" in caplog.text and not ScheduleStore().own_entries()
