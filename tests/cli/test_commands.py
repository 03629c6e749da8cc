"""The command line, on the demo model at a quarter of its tokens and few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddit_rt import ConfigError, DDiTError, ScheduleError, UnsupportedPipelineError
from ddit_rt.cli import app, main

RUNNER = CliRunner()
SMALL = ["--height", "64", "--width", "64", "--steps", "8", "--device", "cpu"]


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate_writes_the_picture_its_baseline_and_what_each_step_did(tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    text = run(
        "generate", "demo", "a red apple", "--output", str(out), "--threshold", "1", "--baseline", "--json", *SMALL
    )
    result = json.loads(text)
    assert out.is_file() and (tmp_path / "apple-baseline.png").is_file()
    assert len(result["report"]["steps"]) == 8
    assert result["report"]["speedup_estimate"] > 1
    assert result["baseline"]["psnr"] > 5


def test_generate_at_threshold_zero_is_the_baseline(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    text = run("generate", "demo", "a star", "--output", str(out), "--threshold", "0", "--baseline", "--json", *SMALL)
    assert json.loads(text)["baseline"]["psnr"] == float("inf")
    assert out.read_bytes() == (tmp_path / "a-baseline.png").read_bytes()


def test_generate_takes_a_schedule(tmp_path: Path) -> None:
    text = run(
        "generate",
        "demo",
        "a ring",
        "--output",
        str(tmp_path / "a.png"),
        "--schedule",
        "1,1,2,4,1,2,2,1",
        "--json",
        *SMALL,
    )
    steps = json.loads(text)["report"]["steps"]
    assert [step["multiple"] for step in steps] == [1, 1, 2, 4, 1, 2, 2, 1]
    assert [step["tokens"] for step in steps] == [64, 64, 16, 4, 64, 16, 16, 64]


def test_generate_takes_what_to_aim_at(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    text = run("generate", "demo", "a ring", "--output", str(out), "--toward-converged", "0.3", "--json", *SMALL)
    assert json.loads(text)["report"]["config"]["toward_converged"] == 0.3


def test_inspect_reads_the_configuration() -> None:
    found = json.loads(run("inspect", "demo", "--height", "128", "--width", "128", "--text-tokens", "24", "--json"))
    assert found["family"] == "flux"
    assert [size["tokens"] for size in found["sizes"]] == [256, 64, 16]
    assert found["sizes"][0]["flops"] > 3 * found["sizes"][1]["flops"]


def test_calibrate_finds_a_threshold() -> None:
    text = run("calibrate", "demo", "--speedup", "1.2", "--prompt", "a heart", "--trials", "4", "--json", *SMALL)
    found = json.loads(text)
    assert found["threshold"] > 0
    assert len(found["trials"]) <= 4
    assert 1.05 < found["speedup"] < 1.4


def test_demo_writes_a_page_with_everything_in_it(tmp_path: Path) -> None:
    text = run("demo", "--output", str(tmp_path), "--steps", "8", "--threshold", "1", "--repeats", "1", "--json")
    result = json.loads(text[text.index("{") :])
    assert set(result["prompts"]) == {"plain", "detailed"}
    page = (tmp_path / "index.html").read_text()
    for picture in ("plain-0.png", "detailed-2.png", "plain-converged.png", "schedules.png", "detailed-reuse.png"):
        assert picture in page and (tmp_path / picture).is_file()
    assert [size["tokens"] for size in result["sizes"]] == [256, 64, 16]


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (["generate", "demo", "a", "--threshold", "-1"], ConfigError, "threshold=-1"),
        (["generate", "demo", "a", "--quantile", "1.5"], ConfigError, "quantile=1.5"),
        (["generate", "demo", "a", "--schedule", "1,x"], ConfigError, "schedule='1,x'"),
        (["generate", "demo", "a", "--schedule", "1,3"], ScheduleError, "schedule[1]=3"),
        (["generate", "demo", "a", "--height", "100"], ConfigError, "height=100"),
        (["generate", "demo", "a", "--adapter", "none.safetensors"], DDiTError, "none.safetensors"),
        (["generate", "demo", "a", "--steps", "0"], ConfigError, "steps=0"),
        (["generate", "demo", "a", "--dtype", "int8"], ConfigError, "int8"),
        (["generate", "./nowhere", "a"], ConfigError, "./nowhere"),
        (["calibrate", "demo", "--speedup", "0.5"], ConfigError, "speedup=0.5"),
        (["demo", "--steps", "3"], ConfigError, "steps=3"),
    ],
)
def test_bad_input_is_named(arguments: list[str], error: type[Exception], names: str, tmp_path: Path) -> None:
    if arguments[0] == "generate":
        arguments = [*arguments, "--output", str(tmp_path / "a.png")]
    with pytest.raises(error, match=names.replace("[", r"\[").replace("]", r"\]")):
        RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_inspect_lists_what_is_supported() -> None:
    listed = {family["family"]: family for family in json.loads(run("inspect", "--supported", "--json"))}
    assert "FluxPipeline" in listed["flux"]["pipelines"]
    assert listed["flux2"]["limits"]
    assert listed["flux2"]["multiples"] == [1, 2, 4] and listed["ltx2"]["multiples"] == [1, 2]
    assert "FluxPipeline" in run("inspect", "--supported")
    with pytest.raises(ConfigError, match="--supported"):
        RUNNER.invoke(app, ["inspect"], catch_exceptions=False)


def test_inspect_refuses_a_variant_that_cannot_be_coarse(tmp_path: Path) -> None:
    for name, config in (("scheduler", {}), ("transformer", {"patch_size": [2, 2, 2], "num_layers": 1})):
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(config))
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        **{name: [None, None] for name in ("vae", "tokenizer", "text_encoder")},
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedPipelineError, match=r"\(2, 2, 2\)"):
        RUNNER.invoke(app, ["inspect", str(tmp_path)], catch_exceptions=False)


def test_inspect_refuses_an_unknown_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(UnsupportedPipelineError, match="KolorsPipeline"):
        RUNNER.invoke(app, ["inspect", str(tmp_path)], catch_exceptions=False)


def test_an_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ddit-rt", "generate", "demo", "a", "--threshold", "-1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "threshold=-1" in capsys.readouterr().err


def test_generate_quantises_or_says_why_it_cannot(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    call = ["generate", "demo", "a red apple", "--output", str(tmp_path / "a.png"), "--json", *SMALL, "--quantize"]
    report = json.loads(run(*call, "int8"))["report"]
    assert (tmp_path / "a.png").is_file() and report["steps"]
    for scheme, said in (("int3", "scheme='int3': use 'auto' or one of"), ("fp8", "cannot be had on cpu")):
        with pytest.raises(ConfigError, match=said):
            RUNNER.invoke(app, [*call, scheme], catch_exceptions=False)
