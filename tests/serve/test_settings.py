"""Settings of a server, as files and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ddit_rt.cli import app
from ddit_rt.errors import DDiTError
from ddit_rt.serve import Limits, ModelConfig, ServeConfig

WHOLE = """
models:
  - name: flux
    model: /models/flux
    speedup: 3
    sizes: [1024x1024, 1360x768]
    replicas: 2
    max_replicas: 4
    loras: {ink: /loras/ink.safetensors}
    call: {num_inference_steps: 28}
    settings: {reference: converged}
    quantize: fp8
  - {name: wan, model: org/wan, gpus: 0.5}
port: 9000
keep_hours: 2
limits: {pixels: 2000000, requests_per_minute: 30}
"""


def test_a_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(WHOLE)
    config = ServeConfig.load(path)
    flux, wan = config.models
    assert (flux.speedup, flux.sizes, flux.max_replicas) == (3, ("1024x1024", "1360x768"), 4)
    assert (flux.loras, flux.settings) == ({"ink": "/loras/ink.safetensors"}, {"reference": "converged"})
    assert (wan.name, wan.gpus, wan.max_batch) == ("wan", 0.5, 4)
    assert (flux.quantize, wan.quantize) == ("fp8", None)
    assert (config.port, config.limits.pixels, config.limits.requests_per_minute) == (9000, 2_000_000, 30)
    again = ServeConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "text, message",
    [
        ("port: 1", "models"),
        ("models: []", "at least one"),
        ("models: [{name: a}]", "'model'"),
        ("models: [{name: a, model: b, speed: 3}]", "speed"),
        ("models: [{name: a, model: b}, {name: a, model: c}]", "twice"),
        ("models: [{name: '../a', model: b}]", "name"),
        ("models: [{name: a, model: b, speedup: 0.5}]", "speedup"),
        ("models: [{name: a, model: b, sizes: [10by10]}]", "10by10"),
        ("models: [{name: a, model: b, settings: {treshold: 1}}]", "treshold"),
        ("models: [{name: a, model: b, speedup: 1, settings: {quality: 30}}]", "'a' has speedup=1 and quality=30"),
        ("models: [{name: a, model: b, speedup: 3, settings: {schedule: [1, 0]}}]", r"speedup=3 and schedule=\[1, 0\]"),
        ("models: [{name: a, model: b, replicas: 0}]", "replicas"),
        ("models: [{name: a, model: b, quantize: int3}]", "scheme='int3': use 'auto' or one of 'fp8'"),
        ("models: [{name: a, model: b}]\nport: 99999", "port"),
        ("models: [{name: a, model: b}]\nlimits: {pixel: 3}", "pixel"),
        ("models: [{name: a, model: b}]\nprot: 3", "prot"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(DDiTError, match=message):
        ServeConfig.load(path)


def test_other_endings_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DDiTError, match="no such file"):
        ServeConfig.load(tmp_path / "none.yaml")
    with pytest.raises(DDiTError, match=r"\.yaml"):
        ServeConfig.load(tmp_path / "serve.toml")


def test_settings_do_not_change() -> None:
    limits: Any = Limits()
    with pytest.raises(DDiTError):
        limits.pixels = 5
    assert ModelConfig(name="a", model="b").replace(speedup=2).speedup == 2


def test_the_command_line_hands_a_quantisation_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServeConfig] = []
    monkeypatch.setattr("ddit_rt.cli.serve._there", lambda package: True)
    monkeypatch.setattr("ddit_rt.serve.run", lambda config, *_: seen.append(config))
    assert CliRunner().invoke(app, ["serve", "demo", "--quantize", "auto"], catch_exceptions=False).exit_code == 0
    assert seen[0].models[0].quantize == "auto"
    with pytest.raises(DDiTError, match="scheme='int3'"):
        CliRunner().invoke(app, ["serve", "demo", "--quantize", "int3"], catch_exceptions=False)
