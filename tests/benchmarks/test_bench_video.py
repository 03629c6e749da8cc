"""What is measured and shown of videos: coarse steps against skipped ones, the spread of seeds, tables."""

import json

import coarse_gain
import coarse_tables
import longer_video
import paper_longer
import pytest
import readme
import readme_figures
import seed_spread
import torch
import video_figures
from evaluations import Evaluation, condense
from helpers.videos import video_model
from live_memory import LiveMemory

from ddit_rt import ConfigError
from ddit_rt.evaluate import Method, Plan
from ddit_rt.evaluate.sweep import RowWriter
from ddit_rt.pipeline import load_any


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return video_model(tmp_path_factory.mktemp("video-model"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball moves left\na star turns\nzebras behind a fence\n")
    return str(path)


def test_ratios_of_models_are_those_of_their_flop():
    assert coarse_gain.ratios_of("wan") == {2: pytest.approx(0.124, abs=0.01), 4: pytest.approx(0.024, abs=0.01)}
    assert coarse_gain.ratios_of("flux") == {2: pytest.approx(0.29, abs=0.01), 4: pytest.approx(0.14, abs=0.01)}
    assert coarse_gain.ratios_of("2:0.5") == {2: 0.5}


def test_coarse_steps_are_compared_with_skipped_ones_at_given_ratios(folder, prompts, tmp_path, monkeypatch, capsys):
    given = [str(folder), "--output", str(tmp_path / "gain"), "--prompts", prompts, "--count", "2", "--apart", "1"]
    given += ["--steps", "16", "--ratios", "2:0.12,4:0.02", "--into", str(tmp_path / "result.json")]
    coarse_gain.main([*given, "--speedups", "2,3"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ratios"] == {"2": 0.12, "4": 0.02} and [line["speedup"] for line in result["lines"]] == [2, 3]
    for line in result["lines"]:
        assert line["skipped"]["steps"]["2"] == line["skipped"]["steps"]["4"] == 0
        if "coarse" in line:
            assert line["coarse"]["speedup"] >= line["speedup"] > line["coarse"]["flops_speedup"] * 0.99
            assert line["coarse"]["steps"]["2"] + line["coarse"]["steps"]["4"] > 0 and line["runs"] == 2
            assert line["difference"] == pytest.approx(line["coarse"]["psnr"] - line["skipped"]["psnr"], abs=1e-6)
            assert {"growth", "flicker", "warping", "ssim", "worst"} <= set(line["coarse"])
            bare = line["without"]
            assert bare["difference"] == pytest.approx(line["coarse"]["psnr"] - bare["psnr"], abs=1e-6)
    text = capsys.readouterr().out
    assert text.rstrip().endswith(".") and "Coarse steps added to skipped steps alone: at 2x" in text
    table = coarse_tables.gain_table(result)
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1

    def measured(*args, **kwargs):
        pytest.fail("what is there was fitted again")

    monkeypatch.setattr(coarse_gain, "Fitter", measured)
    coarse_gain.main([*given, "--speedups", "2,3"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    with pytest.raises(SystemExit, match=r"fits of other prompts, ratios"):
        coarse_gain.main([*given, "--speedups", "2,3", "--ratios", "2:0.3"])


def test_a_search_that_takes_no_coarse_step_is_said_to():
    side = {"speedup": 2.0, "steps": {"1": 8, "2": 0, "4": 0, "0": 8}, "psnr": 30.0, "worst": 25.0}
    lines = [{"speedup": 2, "by": "coarse", "skipped": side}]
    result = {"model": "m", "prompts": 2, "steps": 16, "ratios": {"2": 0.12}, "lines": lines}
    text = coarse_tables.gain_table(result)
    assert "the search takes none" in text and text.endswith("at 2x by delta nothing, since the search takes none.")


def test_what_coarse_steps_are_worth_comes_from_results(tmp_path, monkeypatch):
    side = {"speedup": 3.0, "steps": {"1": 8, "2": 4, "4": 0, "0": 4}, "psnr": 30.0, "worst": 25.0}
    told = {"difference": 0.5, "low": -0.1, "high": 1.1, "p": 0.2, "runs": 8, "better": 5}
    lines = [{"speedup": 2, "by": "coarse", "skipped": side}]
    lines += [{"speedup": 3, "by": "coarse", "skipped": side, "coarse": side, **told}]
    result = {"model": "demo", "prompts": 8, "steps": 16, "ratios": {"2": 0.29}, "lines": lines}
    news = {"multiple": 2, "distance": 3, "tokens": 64, "cost": 0.25, "unchanged": 1.4, "earlier": 0.8}
    news |= {"with_coarse": 0.4, "delta": 1.2, "news": 0.75}
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "coarse-gain.json").write_text(json.dumps(result))
    (tmp_path / "demo" / "coarse.json").write_text(json.dumps([news]))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    found = readme.coarse_contents()
    assert set(found) == {"coarse-gain-demo-table", "news-table"}
    assert "| demo | 2p: 64 | 0.250 | 3 | 1.40 | 0.80 | 0.40 | 1.20 | 75 % |" in found["news-table"]
    assert found["coarse-gain-demo-table"].endswith("the search takes none; at 3x by delta +0.5 dB (p 0.2).")
    readme_figures.gain(result, tmp_path / "figures" / "demo.png")
    assert (tmp_path / "figures" / "demo.png").stat().st_size > 5000


def test_the_spread_of_seeds_is_measured_once(folder, prompts, tmp_path, monkeypatch):
    given = [str(folder), "--into", str(tmp_path / "spread.json"), "--prompts", prompts, "--steps", "4"]
    seed_spread.main([*given, "--count", "1"])
    first = json.loads((tmp_path / "spread.json").read_text())
    assert len(first["psnr_frames"]) == 9 and first["psnr_frames"] == next(iter(first["clips"].values()))
    original, seen = seed_spread.measure, []
    monkeypatch.setattr(seed_spread, "measure", lambda *args: seen.append(args[2]) or original(*args))
    seed_spread.main([*given, "--count", "2"])
    assert seen == ["a star turns"] and len(json.loads((tmp_path / "spread.json").read_text())["clips"]) == 2


@pytest.fixture
def results(tmp_path, folder):
    """Results as ``ddit-rt eval`` and the programs beside it leave them, of made-up values."""
    run, target = tmp_path / "run", tmp_path / "results"
    settings = {"threshold": 1e-3}
    methods = [Method(f"base@{steps}", "base", steps, steps) for steps in (50, 28)]
    methods += [Method(f"{steps // 2}-steps@{steps}", "fewer steps", steps // 2, steps) for steps in (50, 28)]
    methods += [Method("ddit-tau-0.001@50", "DDiT, the paper's τ", 50, 50, settings)]
    plan = Plan(str(folder), methods, ["a", "b"], call={"guidance_scale": 4.0, "num_frames": 9}, converged=False)
    plan.write(run)
    writer, summaries = RowWriter(run / "rows.jsonl"), []
    for number, method in enumerate(methods):
        writer.add({"method": method.name, "flops": 100.0 / (1 + number)})
        summaries.append({"method": method.name, "metrics": {}, "spread": {}, "frames": [30.0, 29.5, 27.0]})
        for prompt in (0, 1):
            values = {"psnr": 30.0 + prompt, "ssim": 0.9, "growth": 1.0 + number, "flicker": 1.1, "warping": 2e-3}
            row = {"method": method.name, "prompt": prompt, "seed": 0, "seconds": 1.0, "reference_seconds": 2.0}
            writer.add({**row, **values, "smoothness": 0.98, "consistency": 0.97})
    (run / "results.json").write_text(json.dumps({"results": summaries}))
    condense(run, target / "evaluation.json")
    spread = {"growth": 0.5, "growth_spread": 0.2, "psnr_frames": [12.0, 11.8, 11.5], "clips": {"a": [], "b": []}}
    (target / "spread.json").write_text(json.dumps(spread))
    return target


def test_tables_of_video_come_from_its_results(results, monkeypatch):
    monkeypatch.setattr(readme, "VIDEO", results)
    found = readme.video_contents()
    assert set(found) == {"video-table", "video-28-table", "video-tau-table", "video-growth", "video-figures"}
    head, _, *rows = found["video-table"].splitlines()[2:]
    assert head.endswith("| growth, dB | flicker | warping x 1000 | smoothness | consistency |") and len(rows) == 3
    assert "2 prompts, 50 steps, guidance 4." in found["video-table"]
    assert "| +5.0 | 1.100 | +2.00 | 0.9800 | 0.9700 |" in rows[2] and rows[2].startswith("| **ddit-tau-0.001**")
    assert "| - | - | - | 0.9800 | 0.9700 |" in rows[0], "the plain clip has no distance from itself"
    assert "| ddit-tau-0.001 | 0.001 | 5.00x | 30.5 ± 0.5 | 30.0 |" in found["video-tau-table"]
    text = found["video-growth"]
    assert "+0.5 ± 0.2 dB" in text and "Of 2 methods 0 stay within +1.5 dB; the others: 25-steps (+3.0)" in text
    (results / "evaluation.json").unlink()
    assert readme.video_contents() == {}


def test_figures_of_video_come_from_its_results(results, tmp_path):
    evaluation = Evaluation.read(results / "evaluation.json")
    assert all(summary.frames == [30.0, 29.5, 27.0] for summary in evaluation.summaries())
    for row in evaluation.rows:
        for name in ("ssim", "growth", "warping", "smoothness", "consistency"):
            row.pop(name, None)
    video_figures.curves(evaluation, tmp_path / "figures", [12.0, 11.8, 11.5])
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"frames-50.webp", "frames-28.webp", "curve-flicker-50.webp", "curve-psnr-28.webp"} <= names
    links = video_figures.links(tmp_path / "figures", tmp_path).splitlines()
    assert links[0].endswith("(figures/curve-psnr-28.webp)") and links[-1].endswith("(figures/frames-50.webp)")


def test_clips_stand_beside_each_other(folder, results, tmp_path, monkeypatch):
    from PIL import Image

    evaluation = Evaluation.read(results / "evaluation.json")
    for method in evaluation.plan.methods:
        object.__setattr__(method, "steps", min(method.steps, 6))
    monkeypatch.setattr(
        video_figures, "ROW", {"base@50": "plain", "25-steps@50": "half the steps", "not there@50": "-"}
    )
    monkeypatch.setattr(video_figures, "load_any", lambda model: load_any(str(folder)))
    evaluation.plan.call.update({"height": 64, "width": 64})
    video_figures.clips(evaluation, tmp_path / "figures", lambda text: None)
    row = Image.open(tmp_path / "figures" / "clips-0.webp")
    assert row.n_frames == 9 and row.width == 2 * 64 + 4
    assert Image.open(tmp_path / "figures" / "frames-of-1.webp").height == 2 * (14 + 64) + 4


def test_longer_clips_are_fitted_to_the_time_of_the_plain_one(folder, prompts, tmp_path, monkeypatch, capsys):
    swept, sweep = [], longer_video.run_sweep
    monkeypatch.setattr(
        longer_video, "run_sweep", lambda pipe, plan, *a, **k: swept.append(plan) or sweep(pipe, plan, *a, **k)
    )
    given = [str(folder), "--output", str(tmp_path / "longer"), "--prompts", prompts, "--count", "2", "--apart", "1"]
    given += ["--steps", "12", "--factors", "1,2,9", "--into", str(tmp_path / "longer.json")]
    longer_video.main(given)
    result = json.loads((tmp_path / "longer.json").read_text())
    own, twice, most = result["lines"]
    assert [line["frames"] for line in (own, twice, most)] == [9, 21, 105]
    assert own["wanted"] == 1 and list(own["methods"]) == ["plain"]
    # 192 tokens become 384: the linear part doubles, attention grows fourfold
    assert 2 < twice["wanted"] < 4 and twice["methods"]["fitted"]["flops_speedup"] >= twice["wanted"] * 0.99
    assert {"psnr", "worst", "growth", "flicker", "seconds"} <= set(twice["methods"]["fitted"])
    # a schedule that the user has kept for such calls is not the rule
    settings = {method.name: method.settings for method in swept[1].methods}
    assert settings["rule@12"] == {"target": {"speedup": pytest.approx(twice["wanted"], abs=1e-3)}}
    assert twice["methods"]["rule"]["flops_speedup"] >= twice["wanted"] * 0.99
    assert twice["bytes"]["fitted"] > 0 and most["bytes"]["plain"] > own["bytes"]["plain"]
    assert most["schedule"] is None and list(most["methods"]) == ["plain"]
    table = capsys.readouterr().out.split("beside the weights.")[1]
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert f"no schedule is {most['wanted']:.2f}x as fast" in table
    monkeypatch.setattr(longer_video, "fit_schedule", lambda *a, **k: pytest.fail("what is there was fitted again"))
    longer_video.main(given)
    with pytest.raises(ConfigError, match="holds an evaluation with other prompts"):
        longer_video.main([*given, "--count", "1"])
    with pytest.raises(SystemExit, match="holds a fit of other prompts, speed-ups or calls"):
        longer_video.main([*given, "--factors", "2", "--steps", "13"])


def test_live_memory_counts_what_operations_make_and_forgets_what_is_freed():
    weight = torch.zeros(1000)
    with LiveMemory() as memory:
        made = torch.ones(250) + 0
        view = made.view(10, 25)
        del made
        assert memory.peak == 2000  # ones, and the sum
        transposed = weight.view(10, 100).t()
        weight.add_(1)
        assert memory.peak == 2000
        del view
        more = torch.ones(600)
    assert memory.peak == 2400 and transposed.shape == (100, 10) and more.shape == (600,)


def test_full_steps_that_are_left_for_a_longer_clip_of_wan():
    gpu = paper_longer.GPUS[-1]
    plain, longer = (paper_longer.length_of("1.3B", frames, gpu) for frames in (81, 161))
    assert (plain.tokens, longer.tokens) == (21 * 30 * 52, 41 * 30 * 52)
    line = paper_longer.line_of(longer, plain)
    assert line["speedup"] == pytest.approx(longer.seconds[1] / plain.seconds[1], abs=1e-3)
    for name, k in (("2p", 2), ("4p", 4)):
        full = line["full_steps"][name]
        assert full * longer.seconds[1] + (50 - full) * longer.seconds[k] <= 50 * plain.seconds[1]
        assert (full + 1) * longer.seconds[1] + (49 - full) * longer.seconds[k] > 50 * plain.seconds[1]
    assert line["full_steps"]["skipped"] == int(50 / line["speedup"])
    assert longer.bytes[1] / plain.bytes[1] == pytest.approx(41 / 21, rel=0.05)
