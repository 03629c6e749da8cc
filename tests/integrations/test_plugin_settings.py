"""What the environment, a file and a request may ask for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddit_rt import ConfigError, DDiTConfig, FittedSchedule, ScheduleError
from ddit_rt.errors import DDiTError
from ddit_rt.integrations.settings import PluginSettings, request_settings, settings_from_environment


def test_an_environment_that_asks_for_nothing_turns_nothing_on() -> None:
    others = {"PATH": "/bin", "DDIT_RT_CACHE": "/x", "DDIT_BACKEND": "torch", "DDIT_SPEEDUP": " "}
    assert settings_from_environment(others) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DDIT_SPEEDUP": "2.5"}, {"speedup": 2.5}),
        ({"DDIT_SPEEDUP": "1"}, {"threshold": 0.0}),
        ({"DDIT_QUALITY": "40"}, {"quality": 40.0}),
        ({"DDIT_SCHEDULE": "1, 1,0,2"}, {"schedule": (1, 1, 0, 2)}),
        ({"DDIT_SCHEDULE": "[1, 1, 0]", "DDIT_MULTIPLES": "1"}, {"schedule": (1, 1, 0), "multiples": (1,)}),
        ({"DDIT_MULTIPLES": "1,2", "DDIT_THRESHOLD": "1e-3"}, {"multiples": (1, 2), "threshold": 1e-3}),
        ({"DDIT_SPEEDUP": "2", "DDIT_CUDA_GRAPHS": "false"}, {"speedup": 2.0, "cuda_graphs": False}),
    ],
)
def test_variables_are_the_fields_of_the_settings(variables: dict[str, str], expected: dict[str, Any]) -> None:
    assert settings_from_environment(variables) == PluginSettings(DDiTConfig(**expected))


def test_a_variable_stands_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ddit.yaml"
    file.write_text("speedup: 3\nreference: plain\ncorrector: false\n")
    fitted = FittedSchedule([1, 1, 0, 1], 1.3, 40.0, 1).save(tmp_path / "schedule.json")
    environment = {"DDIT_CONFIG": str(file), "DDIT_ADAPTER": "owner/adapter"}
    settings = settings_from_environment(environment)
    assert settings == PluginSettings(DDiTConfig(speedup=3, reference="plain", corrector=False), "owner/adapter")
    over = settings_from_environment({**environment, "DDIT_SCHEDULE": str(fitted)})
    assert over is not None
    assert (over.config.schedule, over.config.speedup, over.config.corrector) == ((1, 1, 0, 1), None, False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DDIT_SPEDUP": "2"}, "DDIT_SPEDUP is no setting"),
        ({"DDIT_SPEEDUP": "fast"}, "DDIT_SPEEDUP: speedup='fast'"),
        ({"DDIT_SPEEDUP": "0.5"}, "DDIT_SPEEDUP: speedup=0.5"),
        ({"DDIT_SPEEDUP": "true"}, "DDIT_SPEEDUP: speedup=True"),
        ({"DDIT_SCHEDULE": "1,3"}, r"DDIT_SCHEDULE: schedule\[1\]=3"),
        ({"DDIT_SPEEDUP": "2", "DDIT_QUALITY": "40"}, "speedup=2.0 and quality=40.0|speedup=2 and quality=40"),
        ({"DDIT_CONFIG": "/none.yaml"}, "DDIT_CONFIG: config='/none.yaml': there is no such file"),
        ({"DDIT_SPEEDUP": "3", "DDIT_FIT": "first-calls"}, "DDIT_SPEEDUP, DDIT_FIT: fit='first-calls' would keep"),
        ({"DDIT_CACHE": "*a"}, "DDIT_CACHE='\\*a' is no YAML"),
    ],
)
def test_bad_values_are_refused_by_name(variables: dict[str, str], message: str) -> None:
    with pytest.raises(DDiTError, match=message):
        settings_from_environment(variables)


def test_a_file_that_asks_for_a_fit_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "ddit.yaml"
    file.write_text("speedup: 3\nfit: first-calls\n")
    with pytest.raises(ConfigError, match="DDIT_CONFIG: fit='first-calls'"):
        settings_from_environment({"DDIT_CONFIG": str(file)})
    assert settings_from_environment({"DDIT_CONFIG": str(file), "DDIT_FIT": "null"}) is not None


def test_a_request_says_when_to_be_coarse_and_nothing_else() -> None:
    server = DDiTConfig(quality=40, corrector=False)
    assert request_settings({"speedup": 3}, server) == ({"speedup": 3}, DDiTConfig(speedup=3, corrector=False))
    assert request_settings({"speedup": 1}, server) == ({"threshold": 0.0}, DDiTConfig(threshold=0, corrector=False))
    assert request_settings({"schedule": [1, 2, 0]}, server)[0] == {"schedule": [1, 2, 0]}
    assert request_settings({}, server) == ({}, server)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("2", ConfigError, "ddit='2': give an object"),
        ({"speedup": 0.5}, ConfigError, "ddit: speedup=0.5"),
        ({"speed": 2}, ConfigError, "ddit: 'speed' is no setting of a request"),
        ({"cuda_graphs": True}, ConfigError, "ddit: 'cuda_graphs' is no setting of a request"),
        ({"schedule": [1, 3]}, ScheduleError, r"ddit: schedule\[1\]=3"),
        ({"speedup": 2, "schedule": [1]}, ConfigError, "ddit: speedup=2.* and schedule="),
    ],
)
def test_a_bad_request_is_refused_by_name(given: Any, error: type[DDiTError], message: str) -> None:
    with pytest.raises(error, match=message):
        request_settings(given, DDiTConfig(speedup=2))


def test_a_request_reads_no_file_of_the_server(tmp_path: Path) -> None:
    secret = tmp_path / "schedule.json"
    secret.write_text('{"schedule": [1, 1, 1]}')
    with pytest.raises(ConfigError, match=re.escape("a list of one multiple per step")):
        request_settings({"schedule": str(secret)}, DDiTConfig())


def test_registration_needs_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys, ddit_rt.integrations.settings as s; s.settings_from_environment({'DDIT_SPEEDUP': '2'}); "
        "print([name for name in ('torch', 'diffusers', 'sglang', 'vllm_omni') if name in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"
