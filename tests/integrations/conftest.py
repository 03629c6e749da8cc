"""An environment without ``DDIT_*`` variables, and calls of tiny pipelines as engines make them."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DDIT_") and not name.startswith("DDIT_RT_")]:
        monkeypatch.delenv(name)
