"""Every script in examples/ runs as it stands, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = {
    "quickstart.py": "x fewer FLOP",
    "fit_schedule.py": "dB on another prompt",
    "own_schedule.py": "[1, 1, 1, 4, 0, 1, 4, 0, 1, 4, 0, 1]",
    "adapter.py": "adapter: ",
    "report.py": "tokens instead of 4096",
    "compare_with_baselines.py": "threshold rule",
}
"""Script -> what its output holds."""


def test_every_script_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} - {"__init__.py"} == set(SHOWN)


@pytest.mark.parametrize("script", SHOWN)
def test_the_script_runs(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), str(tmp_path)],
        capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert SHOWN[script] in result.stdout
