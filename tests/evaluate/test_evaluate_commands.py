"""``ddit-rt eval`` and ``ddit-rt analyse`` from end to end on a tiny pipeline."""

import csv
import json
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from prompted import CALL, prompted
from typer.testing import CliRunner

from ddit_rt import TeaCacheConfig
from ddit_rt.cli import app
from ddit_rt.errors import ConfigError, OutOfReachError
from ddit_rt.evaluate import Plan, read_rows
from ddit_rt.evaluate.standard import standard_plan
from ddit_rt.families import family_of, fresh_adapter
from ddit_rt.fitting.teacache import fit_teacache
from ddit_rt.fitting.threshold import calibrate
from ddit_rt.granularity import save_adapter
from ddit_rt.schedule import Report, StepRecord
from ddit_rt.trajectories import generate, psnr
from examples.demo_model.scenes import Noun, render, sample_scene


@pytest.fixture
def run(monkeypatch):
    pipe = prompted()
    monkeypatch.setattr("ddit_rt.pipeline.load_any", lambda *_: pipe)
    monkeypatch.setattr("ddit_rt.pipeline.loading.call_defaults", lambda model: dict(CALL))

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return invoke


def test_eval_with_a_methods_file(run, tmp_path):
    methods = [
        {"name": "base", "kind": "base", "steps": 5, "reference": 5},
        {"name": "fewer", "kind": "fewer steps", "steps": 3, "reference": 5},
        {"name": "mix", "kind": "mixed", "steps": 5, "reference": 5, "settings": {"schedule": [1, 1, 0, 2, 1]}},
    ]
    (tmp_path / "methods.json").write_text(json.dumps(methods))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    out = tmp_path / "out"
    given = ["eval", "tiny", "--output", out, "--prompts", tmp_path / "prompts.txt", "--count", 2]
    first = run(*given, "--methods", tmp_path / "methods.json", "--shard", "0/2")
    assert "other shards are not done" in first and not (out / "results.json").exists()
    run(*given, "--shard", "1/2")
    results = json.loads((out / "results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["base", "fewer", "mix"]
    assert results[1]["flops_speedup"] == pytest.approx(5 / 3) and results[1]["runs"] == 2
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert float(rows[2]["psnr"]) == pytest.approx(results[2]["metrics"]["psnr"], rel=1e-4)
    assert all({"psnr_converged", "ssim_converged"} <= set(result["worst"]) for result in results), "the base too"
    assert float(rows[0]["psnr_converged_worst_tenth"]) == pytest.approx(
        results[0]["worst"]["psnr_converged"], rel=1e-4
    )
    pairs = [(row["first"], row["second"], row["metric"]) for row in csv.DictReader((out / "comparisons.csv").open())]
    assert pairs == [("fewer", "base", "psnr_converged"), ("mix", "base", "psnr_converged")]
    assert (out / "curve-psnr_converged-5.png").stat().st_size > 0
    page = (out / "index.html").read_text()
    assert "PSNR to converged, dB, worst tenth" in page and "mix" in page and page.count("data:image/webp") == 6
    assert (out / "curve-psnr-5.png").stat().st_size > 0
    (out / "results.json").unlink()
    run("eval", "tiny", "--output", out, "--report")
    assert (out / "results.json").exists()


def test_eval_goes_on_with_further_methods_and_prompts(run, tmp_path):
    methods = [
        {"name": "base", "kind": "base", "steps": 5, "reference": 5},
        {"name": "fewer", "kind": "fewer steps", "steps": 3, "reference": 5},
    ]
    (tmp_path / "few.json").write_text(json.dumps(methods))
    mix = {"name": "mix", "kind": "mixed", "steps": 5, "reference": 5, "settings": {"schedule": [1, 1, 0, 2, 1]}}
    (tmp_path / "more.json").write_text(json.dumps([*methods, mix]))
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    out = tmp_path / "out"
    given = ["eval", "tiny", "--output", out, "--prompts", tmp_path / "prompts.txt", "--no-converged"]
    run(*given, "--count", 1, "--methods", tmp_path / "few.json")
    before = [row for row in read_rows(out) if "seconds" in row]
    assert "--count" in run(*given, "--count", 2, "--methods", tmp_path / "more.json")
    rows = [row for row in read_rows(out) if "seconds" in row]
    assert rows[:2] == before and sorted((row["method"], row["prompt"]) for row in rows) == sorted(
        (name, prompt) for name in ("base", "fewer", "mix") for prompt in (0, 1)
    )
    run(*given, "--count", 3)  # without a file of methods the plan is kept
    assert Plan.read(out).prompts == ["one", "two"]
    with pytest.raises(ConfigError, match="other methods"):
        run(*given, "--methods", tmp_path / "few.json")


def test_eval_with_given_methods_keeps_those_of_an_adapter_that_joined(run, tmp_path):
    pipe = prompted()
    path = save_adapter(fresh_adapter(family_of(pipe), pipe.transformer, rank=2), tmp_path / "a.safetensors")
    (tmp_path / "methods.json").write_text(
        json.dumps([{"name": "base", "kind": "base", "steps": 6, "reference": 6}]),
    )
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    given = ["eval", "tiny", "--output", tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--count", 1]
    given += ["--methods", tmp_path / "methods.json", "--no-converged", "--plan"]
    run(*given)
    run(*given, "--adapter", path)
    joined = Plan.read(tmp_path / "out")
    assert len(joined.methods) > 1
    run(*given, "--adapter", path)
    run(*given)
    assert Plan.read(tmp_path / "out") == joined


def test_eval_goes_on_in_its_own_dtype_alone(run, tmp_path, monkeypatch):
    methods = [{"name": "base", "kind": "base", "steps": 5, "reference": 5}]
    (tmp_path / "few.json").write_text(json.dumps(methods))
    more = [*methods, {"name": "fewer", "kind": "fewer steps", "steps": 3, "reference": 5}]
    (tmp_path / "more.json").write_text(json.dumps(more))
    out = tmp_path / "out"
    given = ["eval", "tiny", "--output", out, "--prompts", "demo", "--count", 1, "--no-converged", "--plan"]
    run(*given, "--methods", tmp_path / "few.json")
    begun = Plan.read(out)
    half = prompted()
    half.transformer.to(torch.bfloat16)
    monkeypatch.setattr("ddit_rt.pipeline.load_any", lambda *_: half)
    with pytest.raises(ConfigError, match="in float32, this pipeline is in bfloat16"):
        run(*given, "--methods", tmp_path / "more.json")
    assert Plan.read(out) == begun


@pytest.mark.parametrize(
    ("count", "evaluated"), [([], 40), (["--count", 40], 40), (["--count", 38], 38), (["--count", 8], 8)]
)
def test_eval_of_the_demo_video_takes_what_captions_there_are(run, tmp_path, count, evaluated):
    (tmp_path / "methods.json").write_text(json.dumps([{"name": "base", "kind": "base", "steps": 5, "reference": 5}]))
    given = ["eval", "demo-video", "--output", tmp_path / "out", "--methods", tmp_path / "methods.json", "--plan"]
    text = " ".join(run(*given, "--metrics", "psnr", *count).split())
    assert ("all 40 prompts are evaluated" in text) == (evaluated == 40)
    assert len(Plan.read(tmp_path / "out").prompts) == evaluated
    run(*given, "--metrics", "psnr")  # going on asks for no more than that
    assert len(Plan.read(tmp_path / "out").prompts) == evaluated
    for folder in ("out", "new"):
        with pytest.raises(ConfigError, match="count=41: there are 40 demo-video prompts"):
            run(*given, "--metrics", "psnr", "--count", 41, "--output", tmp_path / folder)


def test_adherence_is_read_from_the_saved_pictures_of_the_demo(run, tmp_path):
    methods = [
        {"name": "base", "kind": "base", "steps": 2, "reference": 2},
        {"name": "fewer", "kind": "fewer steps", "steps": 1, "reference": 2},
    ]
    (tmp_path / "methods.json").write_text(json.dumps(methods))
    (tmp_path / "prompts.txt").write_text("a red apple\na photo of a cat\na ball behind a fence\n")
    out = tmp_path / "out"
    given = ["--output", out, "--prompts", tmp_path / "prompts.txt", "--methods", tmp_path / "methods.json"]
    assert "1 of 3 prompts are outside" in " ".join(run("eval", "demo", *given, "--metrics", "psnr,adherence").split())
    results = json.loads((out / "results.json").read_text())["results"]
    assert all(0 <= result["metrics"]["adherence"] <= 1 for result in results), "the base has its own"
    column = [float(row["adherence"]) for row in csv.DictReader((out / "results.csv").open())]
    assert column == pytest.approx([result["metrics"]["adherence"] for result in results], rel=1e-4)
    assert "prompt adherence" in (out / "index.html").read_text() and (out / "curve-adherence-2.png").exists()

    run("eval", "demo", "--output", out, "--report", "--metrics", "psnr")
    assert "adherence" not in (out / "results.csv").read_text()
    Image.fromarray(render(_scene_with_an_apple(), 128)).save(out / "pictures" / "fewer" / "0000-0.png")
    run("eval", "demo", "--output", out, "--report")
    fewer = json.loads((out / "results.json").read_text())["results"][1]
    assert fewer["metrics"]["adherence"] >= 0.5, "both statements of the first prompt, and none is asked of the second"


def _scene_with_an_apple():
    scenes = (sample_scene(Random(seed)) for seed in range(10**4))
    return next(s for s in scenes if s.nouns == (Noun("apple", "red", "plain", False),) and s.fence is None)


def test_adherence_is_left_out_for_other_models(run, tmp_path):
    (tmp_path / "methods.json").write_text(json.dumps([{"name": "base", "kind": "base", "steps": 1, "reference": 1}]))
    given = ["--output", tmp_path / "out", "--count", 1, "--methods", tmp_path / "methods.json", "--no-converged"]
    assert "left out adherence" in run("eval", "tiny", *given, "--metrics", "psnr,adherence")
    assert "prompt adherence" not in run("eval", "tiny", "--output", tmp_path / "out", "--report").lower()
    assert "converged" not in (tmp_path / "out" / "results.csv").read_text(), "it was not asked for"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["tau", "--values", "0,0.01", "--count", 1], ["tau.json", "tau.csv", "tau.png"]),
        (["patch-size", "--count", 1], ["patch-size.csv"]),
        (["sigma", "--prompt", "a", "--prompt", "b"], ["sigma.json", "sigma.png"]),
        (["schedules", "--prompt", "a", "--tau", "0.05"], ["schedules.json", "schedules.png"]),
        (["rho", "--values", "0.2,0.8", "--tau", "0.05", "--count", 1], ["rho.json"]),
        (["misses", "--values", "1.5,2", "--count", 3], ["misses.json"]),
        (["coarse", "--values", "1", "--multiples", "2", "--count", 2], ["coarse.json"]),
    ],
    ids=lambda value: value[0],
)
def test_analyses(run, tmp_path, arguments, expected):
    if arguments[0] in ("tau", "patch-size", "rho", "misses", "coarse"):
        arguments = [*arguments, "--prompts", "demo"]
    run("analyse", arguments[0], "tiny", "--output", tmp_path, "--steps", 6, *arguments[1:])
    assert all((tmp_path / name).stat().st_size > 0 for name in expected)
    if arguments[0] == "tau":
        full, fast = json.loads((tmp_path / "tau.json").read_text())
        assert full["psnr"] == 100.0 and full["flops_speedup"] == 1.0 and fast["threshold"] == 0.01


def test_what_misses_say_is_their_rank_beside_that_of_the_errors():
    from ddit_rt.evaluate import Misses

    def run(missed, error):
        kinds = [(1.0, 1, None), (0.8, 0, None), (0.5, 1, missed), (0.2, 1, None)]
        steps = [StepRecord(i, 0.0, sigma, k, 1, miss=None if m is None else torch.tensor(m))
                 for i, (sigma, k, m) in enumerate(kinds)]  # fmt: skip
        return SimpleNamespace(frames=torch.full((1, 3, 4, 4), error), report=Report(steps, {}))

    plain = [SimpleNamespace(frames=torch.zeros(1, 3, 4, 4))] * 4
    found = Misses.of(2.0, plain, [run(m, e) for m, e in ((0.1, 0.01), (0.2, 0.02), (0.3, 0.04), (0.4, 0.08))])
    assert found.correlation == pytest.approx(-1) and found.spread == pytest.approx(4) and found.runs == 4
    assert (found.psnr_high, found.psnr_low) == pytest.approx((40, 21.94), abs=0.01)
    found = Misses.of(2.0, plain, [run(m, e) for m, e in ((0.1, 0.08), (0.2, 0.02), (0.3, 0.01), (0.4, 0.04))])
    assert abs(found.correlation) < 0.7 and found.p > 0.3


def test_order_is_compared_at_equal_flop(run, tmp_path, monkeypatch):
    from ddit_rt.evaluate import analyses
    from ddit_rt.fitting.threshold import Calibration

    asked = []

    def found(pipe, prompts, speedup, settings, *args, **call):
        asked.append((speedup, settings["order"]))
        return Calibration(0.02 * settings["order"], speedup, 30.0)

    monkeypatch.setattr(analyses, "calibrate", found)
    run("analyse", "order", "tiny", "--output", tmp_path, "--steps", 6, "--count", 1, "--speedup", 1.5)
    assert asked == [(1.5, 1), (1.5, 2), (1.5, 3)]
    lines = json.loads((tmp_path / "order.json").read_text())
    assert [line["threshold"] for line in lines] == [0.02, 0.04, 0.06]


def test_bad_options_are_refused(run):
    for arguments in (["--metrics", "beauty"], ["--shard", "2/2"], ["--shard", "x"]):
        with pytest.raises(Exception, match=r"metrics=|shard="):
            run("eval", "tiny", *arguments)


def test_teacache_fit():
    pipe = prompted()
    fit = fit_teacache(pipe, ["a"], num_inference_steps=14, **CALL)
    assert len(fit.coefficients) == 5 and [len(stream) for stream in fit.streams] == [13]
    assert fit.share_computed(0.0) == 1.0 and fit.share_computed(1e9) == pytest.approx(2 / 14)
    assert fit.share_computed(fit.threshold_for(2.0)) == pytest.approx(0.5, abs=0.11)
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__


def test_a_speedup_beyond_the_policys_limits_is_refused_with_what_it_reaches():
    with pytest.raises(
        OutOfReachError, match=r"speedup=3 is out of reach: .*max_consecutive_coarse=2.* reaches 1\.\d\d"
    ):
        calibrate(prompted(), ["a"], 3.0, num_inference_steps=14, **CALL)
    found = calibrate(
        prompted(),
        ["a"],
        1.8,
        {"max_consecutive_coarse": None, "initial_full_steps": 0},
        num_inference_steps=14,
        **CALL,
    )
    assert found.speedup > 1.5


def test_calibration_compares_with_the_plain_picture_whatever_the_cache():
    pipe, cache = prompted(), TeaCacheConfig(threshold=0.5, coefficients=(0, 0, 0, 1, 0))
    settings = {"cache": cache, "max_consecutive_coarse": None, "initial_full_steps": 0}
    call = {**CALL, "num_inference_steps": 14}
    found = calibrate(pipe, ["a"], 1.8, settings, trials=1, **call)
    plain, cached = (generate(pipe, one, 0, prompt="a", **call) for one in (None, {"threshold": 0.0, "cache": cache}))
    assert cached.report.speedup_estimate > 1.1, "the cache takes steps"
    fast = generate(pipe, {**settings, "threshold": found.threshold}, 0, prompt="a", **call)
    assert found.psnr == pytest.approx(psnr(fast.frames, plain.frames), rel=1e-6)
    assert found.psnr != pytest.approx(psnr(fast.frames, cached.frames), rel=1e-3)


def test_the_standard_plan_leaves_out_what_is_out_of_reach(caplog):
    plan = standard_plan(prompted(), "demo", ["a", "b"], [5], [0], CALL, ["psnr"], fit_baselines=True)
    assert "ddit-1.6x@5 is left out: speedup=1.6 is out of reach" in caplog.text
    assert "fitted-4x@5 is left out" in caplog.text
    assert {"base@5", "fitted-1.5x@5"} <= {method.name for method in plan.methods}


def test_standard_plan_calibrates(monkeypatch):
    from ddit_rt.evaluate import standard
    from ddit_rt.fitting.threshold import Calibration

    monkeypatch.setattr(standard, "calibrate", lambda pipe, prompts, speedup, *a, **k: Calibration(speedup, speedup, 0))
    plan = standard_plan(prompted(), "demo", ["a", "b"], [10, 8], [0], CALL, ["psnr"], fit_baselines=True)
    names = {method.name for method in plan.methods}
    assert {"base@10", "base@8", "ddit-1.6x@10", "teacache-2x@10", "ddit-skipped-2x@10", "taylorseer-3@10"} <= names
    fitted = next(method for method in plan.methods if method.name == "fitted-2x@10")
    assert len(fitted.settings["schedule"]) == 10 and {"fitted-coarse-1.5x@10", "fitted-skipped-3x@8"} <= names
    tea = next(method for method in plan.methods if method.name == "teacache-2x@10")
    assert len(tea.settings["cache"]["coefficients"]) == 5
    published = standard_plan(prompted(), "some/model", ["a", "b"], [10], [0], CALL, ["psnr"])
    assert {"teacache-0.24@10", "teacache-0.4@10"} <= {method.name for method in published.methods}
