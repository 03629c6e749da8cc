"""``ddit-rt fit --list`` and ``--clear``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddit_rt import FittedSchedule
from ddit_rt.cli import app, main
from ddit_rt.schedule import CallKey, ScheduleStore

KEY = CallKey("0123456789abcdef", "Euler(shift=3)", 50, "cfg", 4096, 16, "converged")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScheduleStore:
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path))
    return ScheduleStore()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["fit", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["ddit-rt", "fit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_list_shows_what_is_kept_in_80_columns(store: ScheduleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddit_rt.cli.fit.console.width", 80)
    store.save(KEY, FittedSchedule([1] * 50, 2.5, 41.25, 4, reference="converged"), "owner/model")
    store.save(CallKey("f" * 32, "E()", 28, "none", 256, 1), FittedSchedule([1] * 28, 3.0, 33.0, 4))
    text = run("--list")
    date = f"{store.own_entries()[0].saved.astimezone():%Y-%m-%d}"
    lines = [line.split() for line in text.splitlines() if date in line]
    assert lines == [
        ["owner/model", "50", "cfg", "4096x16", "converged", "2.50", "41.2", date],
        ["f" * 12, "28", "none", "256", "plain", "3.00", "33.0", date],
    ]
    assert text.splitlines()[-1] == str(store.root)


def test_list_as_json(store: ScheduleStore) -> None:
    assert json.loads(run("--list", "--json")) == []
    store.save(KEY, FittedSchedule([1] * 50, 2.5, 41.25, 4, reference="converged"), "owner/model")
    (entry,) = json.loads(run("--list", "--json"))
    assert entry["key"]["steps"] == 50 and entry["fitted"]["speedup"] == 2.5 and entry["name"] == "owner/model"


def test_clear_removes_them(store: ScheduleStore) -> None:
    store.save(KEY, FittedSchedule([1] * 50, 2.5, 41.25, 4, reference="converged"))
    assert run("--clear") == f"{store.root}: removed 1 schedule\n"
    assert run("--clear") == f"{store.root}: removed 0 schedules\n"
    assert run("--list") == f"{store.root} holds no schedules\n"


@pytest.mark.parametrize("arguments", [[], ["--list", "--clear"], ["demo", "--list"]])
def test_one_thing_at_a_time(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    error = error_of(monkeypatch, capsys, *arguments)
    assert error.startswith("error: give one of MODEL, --schedule, --list and --clear") and error.count("\n") == 1


def test_what_cannot_be_removed_is_one_line(
    store: ScheduleStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = store.save(KEY, FittedSchedule([1] * 50, 2.5, 41.25, 4, reference="converged"))

    def refused(self: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    error = error_of(monkeypatch, capsys, "--clear")
    assert error.startswith("error:") and str(path) in error and error.count("\n") == 1
    assert os.path.exists(str(path))


def test_export_prints_the_environment_of_an_engine(tmp_path: Path) -> None:
    file = FittedSchedule([1, 1, 1, 0, 0, 1, 0, 1], 1.6, 41.0, 4).save(tmp_path / "schedule.json")
    lines = run("--schedule", str(file), "--export", "sglang").splitlines()
    assert "export SGLANG_CACHE_DIT_SCM_COMPUTE_BINS=3,1,1" in lines
    assert "export SGLANG_CACHE_DIT_SCM_CACHE_BINS=2,1" in lines
    assert json.loads(run("--schedule", str(file), "--export", "sglang", "--json"))["SGLANG_CACHE_DIT_WARMUP"] == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schedule", "FILE"), "--export sglang"),
        (("--schedule", "FILE", "--export", "sglang"), "schedule[1]=2"),
        (("demo", "--speedup", "2", "--kinds", "1,2,0", "--export", "sglang"), "--kinds 1,0"),
        (("demo", "--schedule", "FILE", "--export", "sglang"), "give one of MODEL, --schedule"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    file = FittedSchedule([1, 2, 0], 1.6, 41.0, 4).save(tmp_path / "schedule.json")
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert message in " ".join(error_of(monkeypatch, capsys, *given).split())
