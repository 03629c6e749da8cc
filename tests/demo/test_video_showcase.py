"""The demo of videos, on a pipeline of random weights."""

import json
from io import StringIO

import pytest
from helpers.videos import PROMPTS, video_model
from rich.console import Console
from typer.testing import CliRunner

from ddit_rt import ConfigError
from ddit_rt.cli import app
from ddit_rt.demo import print_video_summary, run_video_showcase, video_showcase
from ddit_rt.evaluate import MetricUnavailableError, read_clip
from ddit_rt.pipeline import load_any, loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return video_model(tmp_path_factory.mktemp("video-model"))


@pytest.fixture(scope="module")
def shown(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    pipe = load_any(str(folder))
    return run_video_showcase(pipe, output, steps=10, model=str(folder)), output


def test_every_row_is_compared_with_the_plain_clip(shown):
    result, _ = shown
    assert [entry["prompt"] for entry in result["prompts"].values()] == list(PROMPTS.values())
    for entry in result["prompts"].values():
        assert list(entry["rows"]) == ["plain", "speedup=3", "speedup=5", video_showcase.COARSE]
        plain, *others = entry["rows"].values()
        assert plain["psnr"] is None and plain["speedup_wall_clock"] == 1 and plain["schedule"] == []
        for row in others:
            assert row["speedup_flop"] > 1 and len(row["schedule"]) == 10 and len(row["psnr_frames"]) == 9
            assert all(isinstance(row[name], float) for name in ("psnr", "ssim", "growth", "flicker", "warping"))
        assert set(others[-1]["schedule"]) == {1, 2}
    assert result["clip"] == {"num_frames": 9, "fps": 8, "height": 64, "width": 64}


def test_clips_sheets_and_page_are_written(shown):
    result, output = shown
    assert json.loads((output / "demo.json").read_text())["prompts"] == result["prompts"]
    page = (output / "index.html").read_text()
    for entry in result["prompts"].values():
        assert all(name in page for name in entry["clips"].values())
        for name in ("gif", "mp4"):
            path = output / entry["clips"][name]
            assert path.stat().st_size > 0
        # four clips of 64 pixels, twice as large, with 4 pixels between them
        assert read_clip(output / entry["clips"]["mp4"]).shape == (9, 14 + 128 + 4 + 10, 4 * 132 - 4, 3)
        assert (output / entry["clips"]["sheet"]).is_file()
    assert page.count('class="strip"') == 2 * 3 and 'class="k2"' in page


def test_the_tables_say_what_was_measured(shown):
    console = Console(width=200, record=True, file=StringIO())
    print_video_summary(shown[0], console)
    text = console.export_text()
    assert all(prompt in text for prompt in PROMPTS.values()) and text.count("not called") == 2
    values = shown[0]["prompts"]["plain"]["rows"]["speedup=3"]
    line = next(line for line in text.splitlines() if "speedup=3" in line)
    assert f"{values['psnr']:.1f}" in line and f"{values['warping'] * 1000:+.2f}" in line


def test_without_opencv_the_demo_goes_on(folder, tmp_path, monkeypatch):
    def missing():
        raise MetricUnavailableError("optical flow needs opencv-python-headless")

    monkeypatch.setattr(video_showcase, "warping", missing)
    monkeypatch.setattr(video_showcase, "SHOWN", 1)
    result = run_video_showcase(load_any(str(folder)), tmp_path, steps=10, model=str(folder))
    assert result["prompts"]["plain"]["rows"]["speedup=3"]["warping"] is None
    assert "not measured: no OpenCV" in (tmp_path / "index.html").read_text()


def test_the_command_shows_the_video_model(folder, tmp_path, monkeypatch):
    shipped = {**loading.SHIPPED, "demo-video": folder}
    monkeypatch.setattr(loading, "SHIPPED", shipped)
    arguments = ["demo", "--video", "--steps", "10", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.stdout)["steps"] == 10
    monkeypatch.setattr(loading, "SHIPPED", {**shipped, "demo-video": tmp_path})
    with pytest.raises(ConfigError, match="'demo-video' is not in this installation"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("more", "match"),
    [(["--steps", "9"], "steps=9: .* at least 10"), (["--repeats", "0"], "repeats=0"), (["--threshold", "1"], "video")],
)
def test_numbers_that_show_nothing_are_refused(folder, tmp_path, monkeypatch, more, match):
    monkeypatch.setattr(loading, "SHIPPED", {**loading.SHIPPED, "demo-video": folder})
    with pytest.raises(ConfigError, match=match):
        CliRunner().invoke(app, ["demo", "--video", "--output", str(tmp_path), *more], catch_exceptions=False)
