"""What the demo shows first: targets beside the plain pipeline, against both references."""

import json
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from ddit_rt.demo import DEMO_PROMPTS, print_summary, run_showcase, running, showcase

STEPS = 24


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A run whose pictures are made up; what was asked for, and the result."""
    asked = []
    report = SimpleNamespace(
        speedup_estimate=2.0,
        schedule=[1, 0] * (STEPS // 2),
        kept=None,
        steps=[SimpleNamespace(tokens=256, flops=1e9, seconds=0.1)] * STEPS,
    )

    def outcome(value, accelerated):
        frames = torch.full((1, 3, 8, 8), value)
        return SimpleNamespace(
            frames=frames, seconds=1.0 if accelerated else 3.0, report=report if accelerated else None
        )

    def generate(pipe, settings, seed, **call):
        asked.append((settings, call))
        return outcome(0.5 if settings is None else 0.51, settings is not None)

    monkeypatch.setattr(running, "generate", generate)
    monkeypatch.setattr(running, "generate_converged", lambda pipe, seed, **call: outcome(0.52, False))
    monkeypatch.setattr(showcase, "plot_reports", lambda reports, path: path)
    pipe = SimpleNamespace(device="cpu")
    return run_showcase(pipe, tmp_path, steps=STEPS, repeats=2), asked, tmp_path


def test_targets_run_as_users_ask_for_them_in_turns_with_plain(shown):
    result, asked, _ = shown
    targets = [settings for settings, call in asked if settings is None or "speedup" in settings]
    turn = [None, *showcase.TARGETS.values()]
    assert targets == [None] + turn * 4  # a warm-up, then two repeats of two prompts
    for entry in result["prompts"].values():
        assert list(entry["rows"]) == ["plain", *showcase.TARGETS]
        for row in showcase.TARGETS:
            values = entry["rows"][row]
            assert values["speedup_wall_clock"] == pytest.approx(3) and values["speedup_flop"] == 2
            assert values["psnr"] == pytest.approx(40, abs=0.1) and values["psnr_converged"] == pytest.approx(
                40, abs=0.1
            )
        assert entry["rows"]["plain"]["psnr"] is None
        assert entry["rows"]["plain"]["psnr_converged"] == pytest.approx(33.98, abs=0.1)


def test_what_is_written_is_what_was_measured(shown):
    result, _, folder = shown
    written = json.loads((folder / "demo.json").read_text())
    assert json.dumps(written["prompts"]) == json.dumps(result["prompts"])
    page = (folder / "index.html").read_text()
    for entry in result["prompts"].values():
        for values in entry["rows"].values():
            assert values["picture"] in page and (folder / values["picture"]).is_file()
    for picture in {p for row in result["baselines"]["rows"].values() for p in row["pictures"].values()}:
        assert picture in page and (folder / picture).is_file()


def test_the_first_tables_are_the_targets(shown):
    console = Console(width=200, record=True, file=StringIO())
    print_summary(shown[0], console)
    text = console.export_text()
    parts = (
        DEMO_PROMPTS["plain"],
        "not called",
        "speedup=3",
        "speedup=4",
        "for comparison",
        "delta (coarse",
        "all steps at",
    )
    at = [text.index(part) for part in parts]
    assert at == sorted(at) and "12, by rule" in text
