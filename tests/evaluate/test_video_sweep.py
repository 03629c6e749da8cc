"""Evaluations of videos from end to end, on a pipeline of random weights: every method, clips, tables, resuming."""

import importlib.util
import json
from dataclasses import replace

import pytest
from helpers.videos import CALL, video_model
from typer.testing import CliRunner

from ddit_rt.cli import app
from ddit_rt.errors import ConfigError
from ddit_rt.evaluate import CLIP, Plan, holds_videos, read_clip, read_rows, run_sweep, summarise, sweep
from ddit_rt.evaluate.settings import read_methods
from ddit_rt.evaluate.standard import standard_plan
from ddit_rt.evaluate.sweep import pictures_of
from ddit_rt.pipeline import call_arguments, load_any

METHODS = [
    {"name": "base", "kind": "base", "steps": 8, "reference": 8},
    {"name": "fewer", "kind": "fewer steps", "steps": 4, "reference": 8},
    {
        "name": "mix",
        "kind": "DDiT, mixed",
        "steps": 8,
        "reference": 8,
        "settings": {"schedule": [1, 1, 0, 2, 1, 4, 0, 1]},
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return video_model(tmp_path_factory.mktemp("video-model"))


@pytest.fixture
def given(folder, tmp_path):
    """Arguments of ``ddit-rt eval`` for a few methods, and its output folder."""
    (tmp_path / "methods.json").write_text(json.dumps(METHODS))
    (tmp_path / "prompts.txt").write_text("a red ball moves left\nzebras behind a fence\n")
    files = ["--methods", str(tmp_path / "methods.json"), "--prompts", str(tmp_path / "prompts.txt")]
    return ["eval", str(folder), "--output", str(tmp_path / "out"), "--count", "2", *files], tmp_path / "out"


def run(arguments):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_eval_measures_clips_keeps_them_and_shows_them(given):
    arguments, out = given
    run([*arguments, "--no-converged"])
    results = {result["method"]: result for result in json.loads((out / "results.json").read_text())["results"]}
    assert set(results["base"]["metrics"]) == {"smoothness", "consistency"}, "the plain clip is no distance from itself"
    assert set(results["mix"]["metrics"]) == {"psnr", "ssim", *CLIP} and len(results["mix"]["frames"]) == 9
    assert results["mix"]["worst"]["flicker"] >= results["mix"]["metrics"]["flicker"], "more of it is worse"
    plan = Plan.read(out)
    assert holds_videos(plan, out) and {"height", "num_frames"} <= set(plan.call)
    for method in plan.methods:
        paths = [path for _, _, path in pictures_of(out, plan, method)]
        assert [path.name for path in paths] == ["a red ball moves left-0.mp4", "zebras behind a fence-0.mp4"]
        assert read_clip(paths[0]).shape == (9, 64, 64, 3)
    page = (out / "index.html").read_text()
    assert page.count("data:image/webp") == 3 * 2 and "flicker over base" in page
    assert all((out / f"{name}-8.png").stat().st_size > 0 for name in ("frames", "curve-warping", "curve-growth"))
    row = next(row for row in read_rows(out) if row["method"] == "mix" and "psnr" in row)
    assert (
        len(row["psnr_frames"]) == 9 and min(row["psnr_frames"]) <= row["psnr"] + 0.01 <= max(row["psnr_frames"]) + 0.01
    )


def test_judges_of_pictures_are_left_out_of_videos(given):
    arguments, out = given
    text = run([*arguments, "--no-converged", "--metrics", "psnr,flicker,clip"])
    assert "left out clip: they judge pictures" in " ".join(text.split())
    assert json.loads((out / "plan.json").read_text())["plan"]["metrics"] == ["psnr", "flicker"]


def test_metrics_of_clips_are_refused_of_pictures_before_anything_runs(tmp_path):
    from prompted import prompted

    plan = Plan("tiny", read_methods_of(tmp_path), ["a"], metrics=["psnr", "warping"], converged=False)
    with pytest.raises(ConfigError, match="metrics=warping: FluxPipeline makes no videos"):
        run_sweep(prompted(), plan, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def read_methods_of(tmp_path):
    (tmp_path / "methods.json").write_text(json.dumps(METHODS))
    return read_methods(tmp_path / "methods.json")


def test_a_killed_sweep_of_videos_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    pipe = load_any(str(folder))
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    plan = Plan(str(folder), read_methods_of(tmp_path), ["a", "b"], call=call, metrics=["psnr", *CLIP])
    original, runs = sweep.generate, []

    def dying(*args, **kwargs):
        runs.append(kwargs)
        if len(runs) == 3 + 4:  # the FLOP of three methods, a prompt, and the next one's plain clip
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(sweep, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(pipe, plan, tmp_path / "out", progress=False)
    begun = {(row["method"], row["prompt"]): row for row in read_rows(tmp_path / "out") if "seconds" in row}
    assert len(begun) == 3 and len(runs) == 7
    monkeypatch.setattr(sweep, "generate", original)
    rows = run_sweep(pipe, plan, tmp_path / "out", progress=False)
    timed = {(row["method"], row["prompt"]): row for row in rows if "seconds" in row}
    assert len(timed) == 6 and all(timed[key] == row for key, row in begun.items())
    assert all("psnr_converged" in row for row in timed.values())
    assert [len(summary.frames) for summary in summarise(plan, rows)] == [0, 9, 9]


def test_clips_that_nothing_can_encode_are_kept_frame_by_frame(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "can_encode", lambda: False)
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    plan = Plan(str(folder), read_methods_of(tmp_path)[:1], ["a ball. It rolls 1.5"], call=call, converged=False)
    run_sweep(load_any(str(folder)), plan, tmp_path / "out", progress=False)
    ((_, _, path),) = pictures_of(tmp_path / "out", plan, plan.methods[0])
    assert path.name == "a ball. It rolls 1.5-0" and read_clip(path).shape == (9, 64, 64, 3)


def test_videos_are_named_by_prompts_as_far_as_those_are_short_and_different():
    chinese = "猫" * 84
    prompts = ["a cat", "cats/dogs", "cats dogs", "x" * 201, chinese, chinese[:-1] + "狗", "a cat-0007", "a cat"]
    names = sweep.video_names(prompts)
    assert names[:3] == ["a cat", "cats dogs", "cats dogs-0002"] and names[3] == "x" * 200 + "-0003"
    assert names[4:6] == ["猫" * 66 + "-0004", "猫" * 66 + "-0005"], "whole letters of three bytes"
    assert names[6:] == ["a cat-0007", "a cat-0007-"] and len(set(names)) == len(names)
    assert max(len(f"{name}-12345.mp4".encode()) for name in names) <= 255
    assert sweep.video_names(prompts[:4]) == names[:4], "more prompts rename none"


def test_clips_of_long_and_of_like_prompts_are_kept_and_found(folder, tmp_path):
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    prompts = ["猫" * 100, "cats/dogs", "cats dogs"]
    plan = Plan(str(folder), read_methods_of(tmp_path)[:1], prompts, call=call, metrics=["psnr"], converged=False)
    run_sweep(load_any(str(folder)), plan, tmp_path / "out", progress=False)
    found = {path.name: index for index, _, path in pictures_of(tmp_path / "out", plan, plan.methods[0])}
    assert list(found.values()) == [0, 1, 2] and {"cats dogs-0.mp4", "cats dogs-0002-0.mp4"} <= set(found)


def test_every_kind_of_method_of_the_standard_plan_runs_on_videos(folder, tmp_path):
    """All that the table of pictures has: solvers, caches, coarse paths, the policy, fits, an adapter."""
    from adapters import trained

    from ddit_rt.granularity import save_adapter

    pipe = load_any(str(folder))
    adapter = save_adapter(trained(pipe), tmp_path / "adapter.safetensors")
    plan = standard_plan(
        pipe, str(folder), ["a red ball moves left"], [12], [0], call_arguments(str(folder)), ["psnr", "warping"],
        fit_baselines=True, apart=["a star turns"], adapter=adapter, converged=False,
    )  # fmt: skip
    kinds = {method.kind for method in plan.methods}
    assert ("DBCache" in kinds) == (importlib.util.find_spec("cache_dit") is not None)
    assert {
        "fewer steps", "UniPC, spacing 1.4", "TeaCache", "TaylorSeer", "FirstBlockCache", "linear extrapolation",
        "delta 2p", "mixed", "DDiT", "DDiT, the paper's τ", "DDiT, target", "DDiT, fitted", "fitted, skipped only",
        "adapter", "fitted to the adapter",
    } <= kinds  # fmt: skip
    (paper,) = [method for method in plan.methods if method.kind == "DDiT, the paper's τ"]
    assert paper.settings == {"threshold": 1e-3}
    # one of each kind, the most daring
    plan = replace(plan, methods=list({method.kind: method for method in plan.methods}.values()))
    rows = run_sweep(pipe, plan, tmp_path / "out", pictures=False, progress=False)
    found = summarise(plan, rows)
    assert [summary.kind for summary in found] == [method.kind for method in plan.methods] and len(found) > 25
    assert all(summary.flops_speedup is not None for summary in found)
    assert all(len(summary.frames) == 9 for summary in found if summary.kind != "base")
