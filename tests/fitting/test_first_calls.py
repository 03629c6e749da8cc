"""``accelerate(pipe, fit="first-calls")``: pictures as without it, one fit for all processes, nothing left half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import flux, flux_inputs, latents_of, negative, wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError, DDiTConfig, FittedSchedule
from ddit_rt.config import DEFAULT_SPEEDUP
from ddit_rt.errors import OutOfReachError
from ddit_rt.fitting import FIRST_CALLS, first_calls
from ddit_rt.pipeline import configured, find_accelerated
from ddit_rt.pipeline.targets import FITTED_HERE
from ddit_rt.schedule import ScheduleStore, schedule_of
from ddit_rt.serve import ModelConfig
from ddit_rt.trajectories import generate

STEPS = 12
FOUND = FittedSchedule(schedule_of(STEPS, 6, 1.0), 2.0, 50.0, FIRST_CALLS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The fits that were made; each finds the same schedule at once, or raises what is under "error" in the first."""
    made: list[dict[str, Any]] = []

    def fit(pipe: Any, prompts: Any, speedup: Any, kinds: Any, **settings: Any) -> FittedSchedule:
        assert find_accelerated(pipe) is None, "it is fitted to an accelerated pipeline"
        made.append({"prompts": list(prompts), "speedup": speedup, "kinds": kinds, **settings})
        return FOUND

    monkeypatch.setattr(first_calls, "fit_schedule", fit)
    return made


def a_flux(prompt: int, **more: Any) -> dict[str, Any]:
    inputs = negative(flux_inputs(steps=STEPS, **more))
    embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(prompt))
    return {**inputs, "prompt_embeds": embeds, "generator": torch.Generator().manual_seed(prompt)}


def a_wan(prompt: int) -> dict[str, Any]:
    return {**wan_inputs(steps=STEPS), "generator": torch.Generator().manual_seed(prompt)}


MODELS = {"flux": (flux, a_flux), "wan": (lambda: wan(euler=True), a_wan)}


def said(pipe: Any, prompt: int = 0, **more: Any) -> str:
    """What a call of a FLUX says of its fit."""
    latents_of(pipe, a_flux(prompt, **more))
    return ddit_rt.report(pipe).fit


def kept_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.json"))


# -- what calls give ------------------------------------------------------------------------------------------------


def test_the_last_of_the_first_calls_fits_and_later_calls_run_what_it_found(cache: Path) -> None:
    pipe, heard = flux(), []

    def inputs(prompt: int) -> dict[str, Any]:
        return {**a_flux(prompt), "callback_on_step_end": lambda pipe, index, *_: heard.append(index) or {}}

    with ddit_rt.accelerated(pipe, speedup=2):
        given = [inputs(prompt) for prompt in range(FIRST_CALLS)]
        without = [pipe(**arguments).images for arguments in given]
    states = [arguments["generator"].get_state() for arguments in given]
    heard.clear()
    ddit_rt.accelerate(pipe, speedup=2, fit="first-calls")
    random = torch.get_rng_state()
    for prompt, wanted in enumerate(without):
        arguments = inputs(prompt)
        latents = pipe(**arguments).images
        report = ddit_rt.report(pipe)
        assert torch.equal(latents, wanted) and report.origin == "rule" and report.complete
        assert torch.equal(arguments["generator"].get_state(), states[prompt])
        last = prompt + 1 == FIRST_CALLS
        assert report.fit.startswith("fitted to 4 calls in " if last else f"recorded for a fit, {prompt + 1} of 4")
        assert len(kept_files(cache)) == last
    assert torch.equal(torch.get_rng_state(), random) and heard == [*range(STEPS)] * FIRST_CALLS
    (path,) = kept_files(cache)
    for fresh in (pipe, ddit_rt.accelerate(flux(), speedup=2, fit="first-calls"), ddit_rt.accelerate(flux())):
        latents_of(fresh, inputs(9))
        report = ddit_rt.report(fresh)
        assert report.kept is not None and report.schedule == report.kept.schedule and report.kept.prompts == 4
        assert report.origin == str(path) and str(path) in str(report) and report.fit == ""
        assert report.to_dict()["origin"] == str(path)
    assert not {"check_inputs", "progress_bar"} & vars(ddit_rt.restore(pipe)).keys()


@pytest.mark.parametrize("target", [{"quality": 40.0}, {"speedup": 2.5, "reference": "converged"}])
def test_every_target_is_fitted_to(target: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quality that the rule reaches by no skipped step, too."""
    monkeypatch.setattr(first_calls, "FIRST_CALLS", 1)
    pipe = ddit_rt.accelerate(flux(), fit="first-calls", **target)
    assert said(pipe).startswith("fitted to 1 calls")
    assert said(pipe) == "" and ddit_rt.report(pipe).kept is not None


@pytest.mark.parametrize("model", MODELS)
def test_a_fit_gets_what_calls_were_given(model: str, fits: list[dict[str, Any]]) -> None:
    make, inputs = MODELS[model]
    pipe = ddit_rt.accelerate(make(), fit="first-calls", multiples=(1, 2), speedup=2)
    for prompt in range(FIRST_CALLS):
        latents_of(pipe, inputs(prompt))
    (made,) = fits
    assert (made["speedup"], made["kinds"], made["num_inference_steps"]) == (DEFAULT_SPEEDUP, [1, 2, 0], STEPS)
    for prompt, arguments in enumerate(made["prompts"]):
        given = inputs(prompt)
        assert torch.equal(arguments["prompt_embeds"], given["prompt_embeds"])
        assert not {"generator", "latents", "output_type", "num_inference_steps"} & arguments.keys()
        assert {name: arguments[name] for name in ("height", "width")} == {n: given[n] for n in ("height", "width")}
    latents_of(pipe, inputs(0))
    assert ddit_rt.report(pipe).schedule == FOUND.schedule


def test_copies_of_a_picture_are_one_and_kinds_of_calls_are_told_apart(fits: list[dict[str, Any]]) -> None:
    pipe = ddit_rt.accelerate(flux(), fit="first-calls")
    for prompt in range(FIRST_CALLS):
        assert said(pipe, prompt, height=256, width=256).startswith(
            f"recorded for a fit, {prompt + 1}" if prompt < 3 else "fitted"
        )
        assert said(pipe, prompt, num_images_per_prompt=2).startswith("recorded" if prompt < 3 else "fitted")
    assert [made["prompts"][0]["num_images_per_prompt"] for made in fits] == [1, 1]
    assert [made["prompts"][0]["height"] for made in fits] == [256, 64]


@pytest.mark.parametrize("other", [{"batch": 2}, {"width": 72}])
def test_calls_of_one_size_make_a_fit_that_serves_its_class(other: dict[str, Any]) -> None:
    """Real fits: calls of other exact sizes or batches come between, and nothing of them is measured."""
    pipe = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")

    def told(**more: Any) -> str:
        latents_of(pipe, flux_inputs(steps=STEPS, **more))
        return ddit_rt.report(pipe).fit

    assert told() == told(**other) == "recorded for a fit, 1 of 4"
    assert [told(), told()] == ["recorded for a fit, 2 of 4", "recorded for a fit, 3 of 4"]
    assert told().startswith("fitted to 4 calls in ")
    for more in ({}, other):
        assert told(**more) == "" and ddit_rt.report(pipe).kept is not None
    assert not find_accelerated(pipe).listener.learner._calls  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"prompt": "two words"}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 5, 24)}, 2),
        ({"prompt_embeds": [torch.zeros(5, 24), torch.zeros(7, 24)]}, 2),
        ({}, 1),
    ],
)
def test_prompts_of_a_call_are_counted(arguments: dict[str, Any], wanted: int) -> None:
    assert first_calls._prompts_of(arguments) == wanted


def test_no_more_than_a_few_kinds_of_calls_are_held(fits: list[dict[str, Any]]) -> None:
    pipe = ddit_rt.accelerate(flux(), fit="first-calls")
    sizes = [32, 64, 128, 256, 512]
    assert len(sizes) == first_calls.KINDS + 1
    for size in sizes:
        assert said(pipe, height=size, width=size) == "recorded for a fit, 1 of 4"
    assert said(pipe, height=64, width=64) == "recorded for a fit, 2 of 4"
    assert said(pipe, height=32, width=32) == "recorded for a fit, 1 of 4"  # its first call was dropped


# -- calls that teach nothing ---------------------------------------------------------------------------------------


def test_calls_of_another_kind_are_not_recorded(fits: list[dict[str, Any]]) -> None:
    pipe = ddit_rt.accelerate(flux(), fit="first-calls")
    assert said(pipe, sigmas=[1 - i / STEPS for i in range(STEPS)]) == "not recorded: it has noise levels of its own"
    few = {**a_flux(0), "num_inference_steps": 6}  # which the default target leaves as they are
    latents_of(pipe, few)
    assert ddit_rt.report(pipe).fit == ""
    with configured(pipe, {"schedule": FOUND.schedule}):
        assert said(pipe) == "" and ddit_rt.report(pipe).origin == "given"
    with configured(pipe, {"threshold": 1e-3}):
        assert said(pipe) == "" and ddit_rt.report(pipe).origin == "threshold"
    with configured(pipe, {"speedup": 3}):
        assert said(pipe) == "recorded for a fit, 1 of 4"
    assert said(pipe) == "recorded for a fit, 1 of 4"
    ddit_rt.warmup(pipe, 64, 64, progress=False, **{n: v for n, v in a_flux(0).items() if "embeds" in n})
    assert said(pipe) == "recorded for a fit, 2 of 4"


def test_a_call_that_breaks_off_is_not_recorded(fits: list[dict[str, Any]]) -> None:
    pipe = ddit_rt.accelerate(flux(), fit="first-calls")

    def stop(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        pipe._interrupt = index >= 3
        return {}

    assert said(pipe, callback_on_step_end=stop) == "" and not ddit_rt.report(pipe).complete

    def fail(pipe: Any, *_: Any) -> dict[str, Any]:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        said(pipe, callback_on_step_end=fail)
    assert said(pipe) == "recorded for a fit, 1 of 4"


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_error_in_a_fit_is_logged_once_and_calls_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    tried = []

    def fit(*arguments: Any, **settings: Any) -> None:
        tried.append(1)
        raise OutOfReachError("quality=99: 12 full steps come to 60.0 dB here.")

    monkeypatch.setattr(first_calls, "fit_schedule", fit)
    pipe = flux()
    with ddit_rt.accelerated(pipe, speedup=2):
        wanted = latents_of(pipe, a_flux(0))
    ddit_rt.accelerate(pipe, speedup=2, fit="first-calls")
    texts = [said(pipe) for _ in range(2 * FIRST_CALLS)]
    assert texts[FIRST_CALLS - 1].startswith("not fitted: quality=99") and texts[FIRST_CALLS:] == [""] * FIRST_CALLS
    assert said(pipe, width=72) == "", "its size class is given up, whatever the exact size"
    assert tried == [1] and caplog.text.count("no schedule is fitted") == 1
    assert torch.equal(latents_of(pipe, a_flux(0)), wanted) and not kept_files(cache)


def test_an_interrupt_in_a_fit_leaves_the_pipeline_accelerated(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fit(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(first_calls, "FIRST_CALLS", 1)
    monkeypatch.setattr(first_calls, "fit_schedule", fit)
    pipe = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")
    for _ in range(2):  # it is tried again
        with pytest.raises(KeyboardInterrupt):
            said(pipe)
        assert ddit_rt.report(pipe).speedup_estimate == 2.0 and not kept_files(cache)
    monkeypatch.setattr(first_calls, "fit_schedule", lambda *a, **k: FOUND)
    assert said(pipe).startswith("fitted")


def test_a_cache_that_cannot_be_written_to_serves_this_process(
    cache: Path, fits: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("DDIT_RT_CACHE", str(cache / "file"))  # in which there is no making of folders, for root neither
    pipe = ddit_rt.accelerate(flux(), fit="first-calls")
    for _ in range(FIRST_CALLS + 1):
        said(pipe)
    assert ddit_rt.report(pipe).kept == FOUND and ddit_rt.report(pipe).origin == FITTED_HERE
    assert len(fits) == 1 and "schedules cannot be kept" in caplog.text


# -- processes that share a cache -----------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from ddit_rt.schedule import ScheduleStore
from ddit_rt.schedule.call_key import CallKey
from dataclasses import dataclass

class Key:
    directory = Path(sys.argv[1])

with ScheduleStore().claim(Key) as claimed:
    print(claimed, flush=True)
    sys.stdin.read()
"""


def test_one_process_fits_and_the_others_wait_for_nothing(
    cache: Path, fits: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")
    for _ in range(FIRST_CALLS - 1):
        said(pipe)
    (kind,) = find_accelerated(pipe).listener.learner._calls  # type: ignore[union-attr]
    key = kind[0]
    command = [sys.executable, "-c", HOLDER, str(key.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert said(pipe) == said(pipe) == "another process is fitting" and not fits
        os.kill(other.pid, signal.SIGKILL)
    assert not kept_files(cache)
    assert said(pipe).startswith("fitted to 4 calls") and len(fits) == 1  # the claim died with its owner
    kept_files(cache)[0].unlink()
    # somebody else was quicker
    late = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")
    for _ in range(2):
        said(late)
    ScheduleStore().save(key, FOUND)
    assert said(late) == "" and ddit_rt.report(late).kept == FOUND and len(fits) == 1


def test_a_schedule_that_came_meanwhile_is_not_fitted_again(
    cache: Path, fits: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last call's look into the store and its claim, another process may have saved one."""
    monkeypatch.setattr(first_calls, "FIRST_CALLS", 1)
    pipe = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")
    kept = find_accelerated(pipe).kept  # type: ignore[union-attr]
    claim = kept.claim

    def claim_late(key: Any) -> Any:
        ScheduleStore().save(key, FOUND)
        return claim(key)

    monkeypatch.setattr(kept, "claim", claim_late)
    said(pipe)
    assert not fits and said(pipe) == "" and ddit_rt.report(pipe).kept == FOUND


def test_a_claim_is_one_at_a_time_and_needs_no_folder(cache: Path) -> None:
    pipe = ddit_rt.accelerate(flux(), speedup=2, fit="first-calls")
    said(pipe)
    (kind,) = find_accelerated(pipe).listener.learner._calls  # type: ignore[union-attr]
    store, seen = ScheduleStore(), []

    def other() -> None:
        with store.claim(kind[0]) as claimed:
            seen.append(claimed)

    with store.claim(kind[0]) as claimed:
        assert claimed
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert seen == [False, True]
    assert store.clear() == 0 and not store.root.exists()  # what a claim leaves behind goes too
    (cache / "file").write_text("")
    with ScheduleStore(cache / "file").claim(kind[0]) as first, ScheduleStore(cache / "file").claim(kind[0]) as second:
        assert first and second


# -- settings -------------------------------------------------------------------------------------------------------


def test_a_fit_is_refused_where_it_makes_no_sense() -> None:
    for settings in ({"threshold": 1e-3}, {"schedule": [1, 1]}, {"speedup": None}):
        with pytest.raises(ConfigError, match="fit='first-calls': a schedule is fitted to a target"):
            ddit_rt.accelerate(flux(), fit="first-calls", **settings)
    with pytest.raises(ConfigError, match="fit='always': use 'first-calls' or None"):
        DDiTConfig(fit="always")
    with pytest.raises(ConfigError, match="fit='first-calls': nothing is fitted here"):
        generate(flux(), {"fit": "first-calls"}, 0, **flux_inputs())
    with pytest.raises(ConfigError, match="would keep requests waiting"):
        ModelConfig(name="a", model="demo", settings={"fit": "first-calls"})


def test_a_settings_file_holds_it(tmp_path: Path) -> None:
    config = DDiTConfig(fit="first-calls")
    assert config.speedup == DEFAULT_SPEEDUP and not config.chosen_target
    assert DDiTConfig.load(config.save(tmp_path / "a.yaml")).fit == "first-calls"
