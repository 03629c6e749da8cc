"""Tables and targets from made-up measurements."""

import json

import pytest
import table
from pipe_targets import verdicts

VERSIONS = {"torch": "2.13.0", "triton": "3.7", "diffusers": "0.42.1", "torchao": None}


def row(provider, schedule, steps, wall, step_ms=None, gap=0.0, peak=30.0, **more):
    repeating = {size: {"median": value} for size, value in (step_ms or {}).items()}
    return {
        "provider": provider,
        "schedule": schedule,
        "steps": steps,
        "wall_s": {"median": wall},
        "step_ms": {"repeating": repeating, "switching": more.pop("switching", {})},
        "gap_us": {"median": gap},
        "peak_gib": peak,
        "graph_pool_gib": 0.5,
        "multiples": [1] * steps,
        "executed": ["graph"],
        "versions": VERSIONS,
        "commit": "0123456789abcdef",
        "date": "2026-11-23T10:00:00+00:00",
        **more,
    }


@pytest.fixture
def rows():
    slower = {"1": {"median": 100.5}, "2": {"median": 35.0}, "4": {"median": 14.0}}
    return [
        row("stock", "p", 28, 5.6, {"1": 200.0}, gap=60),
        row("ours+graphs", "p", 10, 2.0, {"1": 200.0}),
        row("ours+graphs", "2p", 10, 0.6, {"2": 60.0}),
        row("ours+graphs", "4p", 10, 0.4, {"4": 40.0}, executed=["eager", "graph"]),
        row("ours+graphs", "switching", 25, 2.0, {"1": 100.0, "2": 30.0, "4": 14.0}, switching=slower),
        row("ours+graphs", "decided", 10, 2.0, {"1": 200.0}, gap=100),
        row("ours+graphs", "mixed", 28, 2.6, {"1": 200.0}, peak=33.0, flop_speedup=2.18, multiples=[1] * 9 + [4] * 19),
        row("ours", "mixed", 28, 2.7, {"1": 200.0}, peak=30.0),
        row("ends", "text encoders", 0, 0.05),
        row("ends", "decoder", 0, 0.15),
        row("ours+graphs+batch2", "mixed", 28, 1.0),
        {**row("ours+graphs+fp8", "mixed", 28, 0.0), "skipped": "torchao is not installed"},
    ]


def test_a_request_is_not_measured_without_its_ends(rows):
    ends = [row for row in rows[:-1] if row["provider"] != "ends"]
    found = {str(verdict): verdict.met for verdict in verdicts("flux", "NVIDIA H200", 28, ends)}
    assert found["not measured: 28 steps in less than 2.38 s (SGLang with a step cache, H200)"] is None
    found = {str(verdict): verdict.met for verdict in verdicts("flux", "NVIDIA H100", 28, ends)}
    assert "MISSED: 28 steps in less than 2.43 s (FP8, denoising only, H100): 2.6" in found


def states(found):
    return {str(verdict).split(": ", 1)[1]: verdict.met for verdict in found}


def test_targets_are_met_or_missed_by_what_was_measured(rows):
    rows[-1].pop("wall_s")
    found = states(verdicts("flux", "NVIDIA H200", 28, rows))
    assert list(found.values()) == [True, False, True, False, True, False, True, False]
    assert "a step at 2p at least 3.2 times as fast as at p: 3.33" in found
    assert "28 steps in less than 2.38 s (SGLang with a step cache, H200): 2.8" in found
    assert all(met is None for met in states(verdicts("wan", "NVIDIA H200", 50, [])).values())
    assert not any("less than" in text for text in states(verdicts("wan", "NVIDIA A100", 50, [])))


def test_tables_state_schedules_records_and_errors(rows, tmp_path, capsys):
    rows[-1].pop("wall_s")
    what = {"title": "FLUX.1-dev", "weights": "random"}
    folder = tmp_path / "h100"
    folder.mkdir()
    content = {"dry_run": False, "machine": {"gpu": "NVIDIA H100"}, "what": what, "rows": rows}
    (folder / "flux.json").write_text(json.dumps(content))
    (folder / "wan.json").write_text(json.dumps({**content, "dry_run": True}))
    time = {"median_us": 9.0}
    kernel = {"kernel": "decision", "case": "FLUX 1024", "share_of_ceiling": 0.5, "device": time}
    common = {"versions": VERSIONS, "commit": None, "date": "2026-11-23T10:00:00+00:00"}
    records = [{**kernel, **common, "provider": name} for name in ("kernel", "eager")]
    records.append({"kernel": "embed", "case": "x", "provider": "eager", "error": "no", **common})
    ceilings = {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 7e14}
    content = {"dry_run": False, "machine": {"gpu": "NVIDIA H100"}, "ceilings": ceilings, "rows": records}
    (folder / "kernels.json").write_text(json.dumps(content))
    table.main(["--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert "| decision | FLUX 1024 | 9.0 | 50% | eager 9.0 |" in text
    assert "| ours+graphs | mixed | 28 | 2.60 | 2.15 | 2.18 | p 200.0 | 0 | 33.0 | 0.50 |" in text
    assert "| ours+graphs (fell back to eager) | 4p |" in text
    assert "Mixed, 28 steps, by hand: 9 p, 19 4p." in text
    assert "torchao is not installed" in text and "Wan" not in text
    assert "- H200, SGLang with a step cache: 2.38 s (to beat)" in text and "- MISSED: a step at 4p" in text
    assert "28 steps: ours 2.60 s denoising, 2.80 s with text encoders and decoder (ours+graphs, mixed)" in text


def test_nothing_measured(tmp_path, capsys):
    table.main(["--results", str(tmp_path)])
    assert "No GPU has been measured yet" in capsys.readouterr().out
