"""The end-to-end benchmark's code path, at tiny sizes on the CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "pipelines.py"


@pytest.fixture(scope="module")
def pipelines():
    spec = importlib.util.spec_from_file_location("bench_pipelines", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_measures_every_provider_and_schedule(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "PROVIDERS", ("stock", "ours", "ours+graphs"))
    out = tmp_path / "new" / "result.json"
    assert pipelines.main(["--dry-run", "--runs", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert "mean nothing" in result["what"]
    for model in ("flux", "wan"):
        found = result["models"][model]
        assert list(found["stock"]) == ["p"] and list(found["ours"]) == ["p", "2p", "4p", "mixed"]
        assert found["ours"]["2p"]["flop_speedup"] > 1
        assert set(found["ours+graphs"]["mixed"]["seconds_per_switching_step"]) == {"2", "4"}


def test_without_a_device_it_says_so(pipelines, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pipelines.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [4, 28, 50])
def test_schedules_have_one_entry_per_step(pipelines, steps):
    assert all(len(pipelines.schedule_of(name, steps)) == steps for name in pipelines.SCHEDULES)
