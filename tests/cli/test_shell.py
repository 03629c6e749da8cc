"""What a shell sees of ``ddit-rt``: quick help, nothing from other libraries, errors in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddit_rt.cli import main
from ddit_rt.cli.quiet import hide_loading_bars
from ddit_rt.cli.terminal import activity, print_error

COMMANDS = [
    [],
    ["demo"],
    ["generate"],
    ["inspect"],
    ["fit"],
    ["calibrate"],
    ["eval"],
    ["analyse"],
    *(["analyse", name] for name in ("order", "tau", "rho", "patch-size", "misses", "coarse", "sigma", "schedules")),
    ["distill"],
    *(["distill", name] for name in ("train", "record", "push")),
    ["serve"],
    ["bench"],
    ["bench", "serve"],
]

HELP = """
import sys
from ddit_rt.cli import main

for words in {commands!r}:
    sys.argv = ["ddit-rt", *words, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0, words
print("heavy:", sorted({{"torch", "diffusers", "transformers", "matplotlib"}} & set(sys.modules)))
"""

UNTOUCHED = """
import os, sys, warnings
before = dict(os.environ), list(warnings.filters)
import ddit_rt.cli
assert (dict(os.environ), list(warnings.filters)) == before
assert not {"pydantic", "yaml", "torch"} & set(sys.modules)
"""


def environment() -> dict[str, str]:
    """That of a user, whatever earlier tests of ``main`` have set in this process."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}


def call(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment(), text=True, **options)  # type: ignore[call-overload]


def exit_status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr("sys.argv", ["ddit-rt", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_help_of_every_command_imports_nothing_heavy() -> None:
    done = call("-c", HELP.format(commands=COMMANDS), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(COMMANDS)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_importing_the_command_line_changes_nothing_global() -> None:
    done = call("-c", UNTOUCHED, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_no_other_library_is_heard_where_stderr_is_a_file(tmp_path: Path) -> None:
    done = call("-m", "ddit_rt.cli", "inspect", "demo", capture_output=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("FluxPipeline (family flux)")


def _read(file: int) -> bytes:
    try:
        return os.read(file, 1 << 12)
    except BlockingIOError:
        return b""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_shows_one_bar_at_a_time_and_it_is_ours(tmp_path: Path) -> None:
    import termios

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # tqdm draws nothing on 0 columns
    arguments = ["generate", "demo", "a red apple", "--steps", "4", "--output", str(tmp_path / "a.png")]
    done = call(
        "-m", "ddit_rt.cli", *arguments, "--height", "64", "--width", "64", stdout=subprocess.PIPE, stderr=theirs
    )
    os.set_blocking(ours, False)  # all of it is there
    text = "".join(chunk.decode() for chunk in iter(lambda: _read(ours), b""))
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, text
    assert "4 steps (4 at p)" in done.stdout
    shown = [part for part in re.split(r"[\r\n]|\x1b\[A", text) if part.strip()]
    order = ["importing torch and diffusers", "loading demo", "accelerated"]
    kinds = [next((name for name in order if part.startswith(name)), part) for part in shown]
    assert sorted(set(kinds), key=kinds.index) == order and kinds == sorted(kinds, key=order.index)


def test_bars_of_loading_are_hidden_and_those_of_downloads_stay() -> None:
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as of_transformers

    try:
        hide_loading_bars()
        assert not of_diffusers.is_progress_bar_enabled() and not of_transformers.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    finally:
        of_diffusers.enable_progress_bar()
        of_transformers.enable_progress_bar()


def test_activity_writes_nothing_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture) -> None:
    with activity("fitting") as show:
        show("plain run")
    assert capfd.readouterr() == ("", "")


def test_an_error_is_one_line_with_every_bracket(capsys: pytest.CaptureFixture) -> None:
    print_error("schedule[1]=3:\n[bold] is none of\n  1, 2")
    assert capsys.readouterr().err == "error: schedule[1]=3: [bold] is none of 1, 2\n"


def test_bad_values_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_status(monkeypatch, "generate", "demo", "a", "--threshold", "-1") == 2
    error = capsys.readouterr().err
    assert "threshold=-1" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["distill", "train", "owner/model", "--out", "run", "--prompts", "none.txt"], "none.txt"),
        (["distill", "train", "demo", "--out", "run", "--multiples", "2,x"], "multiples='2,x'"),
        (["generate", "demo", "a", "--schedule", "none.json"], "none.json"),
        (["generate", "demo", "a", "--output", "a.xyz"], "a.xyz"),
        (["generate", "demo", "a", "--device", "gpu"], "device='gpu'"),
        (["generate", "demo", "a", "--frames", "5"], "frames=5: FluxPipeline makes pictures"),
        (["inspect", "owner/no such model"], "owner/no such model"),
        (["analyse", "rho", "demo", "--values", "0.1,nan"], "values='0.1,nan'"),
        (["analyse", "coarse", "demo", "--multiples", "2,3"], "multiples=(1, 2, 3)"),
        (["eval", "demo", "--report", "--output", "none"], "none holds no evaluation"),
        (["fit", "demo", "--call", '{"true_cfg": 2}'], "no argument 'true_cfg'"),
        (["fit", "demo", "--speedup", "1"], "speedup=1"),
    ],
)
def test_bad_values_and_missing_files_leave_nothing_behind(
    arguments: list[str], names: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert names in error and error.startswith("error:") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["calibrate", "demo", "--trials", "0"], "--trials"),
        (["generate", "demo", "a", "--seed", "9" * 23], "--seed"),
        (["eval", "demo", "--methods", "none.json"], "none.json"),
        (["distill", "train", "demo"], "--out"),
        (["generat", "demo"], "generat"),
    ],
)
def test_usage_errors_exit_with_2(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_status(monkeypatch, *arguments) == 2
    assert names in capsys.readouterr().err


def test_control_c_is_one_line_and_exit_code_130(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddit_rt.pipeline.load_any", stopped)
    assert exit_status(monkeypatch, "generate", "demo", "a") == 130
    assert capsys.readouterr().err == "interrupted\n"
