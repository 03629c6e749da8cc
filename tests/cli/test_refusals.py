"""Files and values that a command cannot use: one line and exit status 2, before a model is loaded where it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxPipeline  # other libraries speak while they are imported, so before the tests

from ddit_rt.cli import main
from ddit_rt.schedule import FittedSchedule

FILES = {
    "latin1.txt": "ein Löwe\n".encode("latin-1"),
    "broken.jsonl": b'{"prompt": "a star"}\n{"prompt": \n',
    "lacking.jsonl": b'{"prompt": "a star"}\n{"seed": 3}\n',
    "numbers.json": b"[1, 2]",
    "number.json": b"3",
    "methods.txt": b"\xff\xfe\x00",
    "seeds.jsonl": b'{"prompt": "a star", "seed": 99999999999999999999999}\n',
    "afile": b"",
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dir.png").mkdir()


def refusal(arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line, of a command that has made nothing."""
    monkeypatch.setattr("sys.argv", ["ddit-rt", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error:") and error.count("\n") == 1
    assert {path.name for path in Path.cwd().iterdir()} == {*FILES, "dir.png"}
    return error


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["fit", "demo", "--prompts", "latin1.txt"], "prompts='latin1.txt' is no text in UTF-8"),
        (["eval", "demo", "--prompts", "latin1.txt"], "prompts='latin1.txt' is no text in UTF-8"),
        (["analyse", "order", "demo", "--prompts", "latin1.txt"], "prompts='latin1.txt' is no text in UTF-8"),
        (["fit", "demo", "--prompts", "broken.jsonl"], "prompts='broken.jsonl', line 2 is no JSON"),
        (["fit", "demo", "--prompts", "lacking.jsonl"], "prompts='lacking.jsonl', entry 2: {'seed': 3} is no prompt"),
        (["fit", "demo", "--prompts", "numbers.json"], "prompts='numbers.json', entry 1: 1 is no prompt"),
        (["fit", "demo", "--prompts", "number.json"], "prompts='number.json' holds 3"),
        (["generate", "demo", "--prompts", "seeds.jsonl"], "seed=99999999999999999999999 is no whole number"),
        (["eval", "demo", "--shard", "²/3"], "shard='²/3'"),
        (["fit", "demo", "--kinds", "0"], "kinds=[0]"),
        (["fit", "demo", "--call", '{"num_inference_steps": "x"}'], "num_inference_steps='x'"),
        (["fit", "demo", "--call", '{"num_inference_steps": 2.5}'], "num_inference_steps=2.5"),
        (["fit", "demo", "--call", f'{{"seed": {"9" * 5000}}}'], "is no JSON"),
        (["generate", "demo", "a", "--output", "dir.png"], "output='dir.png' is a folder, a file is wanted"),
        (["generate", "demo", "a", "--output", "afile/x.png"], "afile is a file, a folder is wanted"),
        (["generate", "demo", "--prompts", "latin1.txt", "--output", "afile"], "afile is a file, a folder is wanted"),
        (["fit", "demo", "--output", "afile/x.json"], "afile is a file, a folder is wanted"),
        (["analyse", "order", "demo", "--output", "afile"], "afile is a file, a folder is wanted"),
        (["demo", "--output", "afile/new"], "afile is a file, a folder is wanted"),
        (["bench", "serve", "http://127.0.0.1:9", "--output", "afile"], "afile is a file, a folder is wanted"),
        (["eval", "demo", "--output", "afile"], "afile is a file, a folder is wanted"),
        (["distill", "train", "demo", "--out", "afile"], "afile is a file, a folder is wanted"),
        (["bench", "serve", "http://127.0.0.1:9", "--api-key", "kéy"], "api-key holds 'é'"),
    ],
)
def test_bad_files_and_values_are_one_line_before_a_model_is_loaded(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddit_rt.pipeline.load_any", lambda *_: pytest.fail("loaded"))
    error = refusal(arguments, capsys, monkeypatch)
    assert names in error and "kéy" not in error


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["eval", "demo", "--methods", "methods.txt", "--count", "1"], "methods='methods.txt'"),
        (["fit", "demo", "--call", '{"output_type": "latent"}'], "output_type='latent'"),
        (["fit", "demo", "--call", '{"generator": 3}'], "generator=3"),
        (["fit", "demo", "--call", '{"true_cfg_scale": "x"}'], "true_cfg_scale='x'"),
        (["eval", "demo", "--call", '{"guidance_scale": NaN}'], "guidance_scale=nan"),
        (["eval", "demo", "--call", '{"num_inference_steps": 2.5}'], "num_inference_steps=2.5"),
    ],
)
def test_what_only_the_pipeline_tells_is_one_line_before_it_runs(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FluxPipeline, "check_inputs", lambda *_, **__: pytest.fail("ran"))
    assert names in refusal(arguments, capsys, monkeypatch)


def test_a_fit_into_a_folder_names_the_file_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FittedSchedule(schedule=[1, 1, 0, 1], speedup=1.3, psnr=30.0, prompts=1)
    monkeypatch.setattr("ddit_rt.fitting.fit_schedule", lambda *_, **__: found)
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("sys.argv", ["ddit-rt", "fit", "demo", "--output", "kept"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "kept/schedule.json: 1.30x" in capsys.readouterr().out
    assert FittedSchedule.load("kept/schedule.json").schedule == [1, 1, 0, 1]
