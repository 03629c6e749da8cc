"""``ddit-rt generate --prompts``: killed, completed by two processes, added to; on the demo model, small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from PIL import Image
from typer.testing import CliRunner

import ddit_rt.trajectories
from ddit_rt import ConfigError
from ddit_rt.cli import app

RUNNER = CliRunner()
SMALL = ["--height", "64", "--width", "64", "--steps", "6", "--schedule", "1,1,0,1,0,1", "--device", "cpu"]
PROMPTS = ["a red apple", "a star", "a ring", "a heart", "zebras behind a fence"]


@pytest.fixture(autouse=True)
def no_processes() -> Iterator[None]:
    """Accelerate remembers how a process was started, for all that follows in it."""
    yield
    PartialState._reset_state()


def arguments(prompts: Path, output: Path) -> list[str]:
    return ["generate", "demo", "--prompts", str(prompts), "--output", str(output), *SMALL, "--json"]


def start(command: list[str], **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, **pipes, **more)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["prompt"]: entry for entry in map(json.loads, lines)}


def test_a_killed_run_is_completed_by_two_processes(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS))
    killed = start(["ddit_rt.cli", *arguments(prompts, out)])
    try:
        while killed.poll() is None and not list(out.glob("records/*.json")):
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        _, said = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, said
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 0 < len(before) < len(PROMPTS) and not (out / "manifest.jsonl").exists()
    for path in before:
        Image.open(path).load()  # a half one raises

    both = start(["torch.distributed.run", "--nproc-per-node", "2", "-m", "ddit_rt.cli", *arguments(prompts, out)])
    told, said = both.communicate(timeout=180)
    assert both.returncode == 0, said[-3000:]
    result = json.loads(told)  # of the first process, and of it alone
    recorded = len(list(out.glob("records/*.json")))
    assert recorded == len(PROMPTS) and result["made"] + result["before"] == recorded and result["before"] >= 1
    assert result["failed"] == 0
    made = records(out)
    assert list(made) == PROMPTS and [entry["seed"] for entry in made.values()] == [0, 1, 2, 3, 4]
    assert all(entry["steps"] == [1, 1, 0, 1, 0, 1] and entry["speedup"] > 1.4 for entry in made.values())
    assert sorted(path.name for path in out.glob("*.png")) == sorted(entry["file"] for entry in made.values())
    assert list(out.glob(".parts/*")) == []

    # the picture of a line is that of a call of its own, whoever made it
    for prompt in PROMPTS[::2]:
        own = tmp_path / "own.png"
        seed = str(made[prompt]["seed"])
        RUNNER.invoke(app, ["generate", "demo", prompt, "--output", str(own), *SMALL, "--seed", seed])
        assert own.read_bytes() == (out / made[prompt]["file"]).read_bytes()

    prompts.write_text("\n".join([*PROMPTS, "a yellow star"]))
    added = RUNNER.invoke(app, arguments(prompts, out), catch_exceptions=False)
    assert json.loads(added.stdout)["made"] == 1 and json.loads(added.stdout)["before"] == len(PROMPTS)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    with pytest.raises(ConfigError, match="holds pictures made with call="):
        RUNNER.invoke(app, [*arguments(prompts, out), "--steps", "7"], catch_exceptions=False)


def test_a_prompt_that_fails_is_named_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS[:3]))
    plain = ddit_rt.trajectories.timed_call

    def failing(pipe: Any, seed: int, call: Any) -> Any:
        if call["prompt"] == "a star":
            raise RuntimeError("out of memory")
        return plain(pipe, seed, call)

    monkeypatch.setattr(ddit_rt.trajectories, "timed_call", failing)
    found = RUNNER.invoke(app, arguments(prompts, out))
    assert found.exit_code == 1 and json.loads(found.stdout)["failed"] == 1
    assert "line 2 ('a star'): RuntimeError: out of memory" in found.stderr
    assert records(out)["a star"]["error"] == "RuntimeError: out of memory" and len(list(out.glob("*.png"))) == 2
    monkeypatch.undo()
    found = RUNNER.invoke(app, arguments(prompts, out), catch_exceptions=False)
    assert found.exit_code == 0 and json.loads(found.stdout)["made"] == 1
    assert "error" not in records(out)["a star"]


def test_what_does_not_go_with_a_file_of_prompts_is_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star")
    for more, told in (
        (["a ring", "--prompts", str(prompts)], "either a prompt or --prompts"),
        ([], "either a prompt or --prompts"),
        (["--prompts", str(prompts), "--baseline"], "--baseline is for one prompt"),
    ):
        with pytest.raises(ConfigError, match=told):
            RUNNER.invoke(app, ["generate", "demo", *more, *SMALL], catch_exceptions=False)
