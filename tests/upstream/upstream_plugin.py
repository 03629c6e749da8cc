"""Pytest plugin: runs diffusers' own pipeline tests on local components, plain or accelerated, and writes down how.

Loaded with ``-p upstream_plugin``; :file:`run.sh` does.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from upstream_calls import MODES, Judge, judged
from upstream_components import LocalHub


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddit_rt")
    group.addoption("--ddit-mode", choices=MODES, default="plain", help="how calls of supported pipelines run")
    group.addoption("--ddit-log", type=Path, required=True, help="JSON file that takes the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Log(config.getoption("--ddit-mode"), config.getoption("--ddit-log")), "ddit-log")


class Log:
    """Outcome of every test, and what the judge says of its calls."""

    def __init__(self, mode: str, path: Path) -> None:
        self._mode = mode
        self._path = path
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._judge = Judge(mode) if mode != "plain" else None
        self._stack = ExitStack()

    def pytest_sessionstart(self) -> None:
        self._stack.enter_context(LocalHub())
        if self._judge is not None:
            self._stack.enter_context(judged(self._judge))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        mismatches = len(self._judge.mismatches) if self._judge else 0
        refused = len(self._judge.refused) if self._judge else 0
        self._outcomes[item.nodeid] = outcome = {"outcome": "passed", "reason": "", "mismatches": [], "refused": []}
        result = yield
        if self._judge is not None:
            outcome["mismatches"] = self._judge.mismatches[mismatches:]
            outcome["refused"] = self._judge.refused[refused:]
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = self._outcomes[report.nodeid]
        if report.outcome != "passed" and outcome["outcome"] != "failed":
            outcome["outcome"] = report.outcome
            last = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
            outcome["reason"] = last.strip().splitlines()[-1] if last.strip() else ""

    def pytest_sessionfinish(self) -> None:
        self._stack.close()
        found = {"mode": self._mode, "tests": self._outcomes, "calls": 0, "raised": 0}
        if self._judge is not None:
            found |= {"calls": self._judge.calls, "raised": self._judge.raised}
        self._path.write_text(json.dumps(found, indent=1), encoding="utf-8")
