"""The support table of the documentation is what the kit found, for the families and checks that there are."""

from __future__ import annotations

import json

import pytest
import support
from specimens import SPECIMENS

from ddit_rt.families import FAMILIES, family_of
from ddit_rt.families.testing import CHECKS

FINDINGS = json.loads(support.FINDINGS.read_text(encoding="utf-8"))


def test_the_page_shows_the_findings() -> None:
    page = support.PAGE.read_text(encoding="utf-8")
    assert support.table(FINDINGS) in page


def test_every_family_has_a_specimen() -> None:
    assert {found["family"] for found in FINDINGS.values()} == {family.name for family in FAMILIES}


def test_the_findings_are_of_all_specimens_and_checks() -> None:
    assert set(FINDINGS) == set(SPECIMENS)
    assert all(list(found["checks"]) == list(CHECKS) for found in FINDINGS.values())


@pytest.mark.parametrize("name", SPECIMENS)
def test_limits_are_those_declared(name: str) -> None:
    pipe = SPECIMENS[name].make()
    family = family_of(pipe)
    declared = {**family.limits, **SPECIMENS[name].limits}
    found = {check: reason for check, (verdict, reason) in FINDINGS[name]["checks"].items() if verdict == "limit"}
    applicable = {c for c, (verdict, _) in FINDINGS[name]["checks"].items() if verdict in ("pass", "limit")}
    assert found == {check: reason for check, reason in declared.items() if check in applicable}
    assert FINDINGS[name]["family"] == family.name
    assert FINDINGS[name]["pipeline"] == type(pipe).__name__
