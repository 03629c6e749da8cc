"""Every family's specimens go through the conformity kit.

The first of a family goes through all checks; its variants through those that differ with what a call holds, and with
`--thorough` through all as well.
"""

from __future__ import annotations

import itertools
import json

import pytest
from specimens import SPECIMENS
from support import FINDINGS

from ddit_rt.families.testing import CHECKS, run_check

OF_VARIANTS = ("small picture", "exact", "exact, guided", "exact, odd size", "paths", "report")


def _cases() -> list[object]:
    """(Specimen, check), those that only `--thorough` runs marked so."""
    families = {name: found["family"] for name, found in json.loads(FINDINGS.read_text(encoding="utf-8")).items()}
    first = {families.get(name, name): name for name in reversed(SPECIMENS)}.values()
    cases = []
    for name, check in itertools.product(SPECIMENS, CHECKS):
        marks = () if name in first or check in OF_VARIANTS else (pytest.mark.thorough,)
        cases.append(pytest.param(name, check, marks=marks, id=f"{name}-{check}"))
    return cases


@pytest.mark.parametrize(("specimen", "check"), _cases())
def test_conformity(specimen: str, check: str) -> None:
    outcome = run_check(SPECIMENS[specimen], check)
    if outcome.verdict != "pass":
        pytest.skip(f"{outcome.verdict}: {outcome.reason}")
