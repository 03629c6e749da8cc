"""Writes the support table of docs/models.md from what the conformity kit finds.

`python tests/families/support.py [SPECIMEN ...]`, or `--check NAME` for one check on all of them. Findings are kept in
docs/models.json; test_support.py holds both to the specimens and checks that there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FINDINGS, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- begin: written by tests/families/support.py -->", "<!-- end -->"


def find(names: Sequence[str], check: str | None = None) -> dict[str, Any]:
    """Specimen -> its pipeline, its family, and check -> verdict and reason; progress on stderr.

    Args:
        names: Of specimens to check anew; the others keep what was found. None given: all.
        check: The only one to run; what else was found is kept.
    """
    sys.path[:0] = [str(ROOT / "tests" / "helpers")]
    from specimens import SPECIMENS

    from ddit_rt.families.testing import CHECKS

    kept = json.loads(FINDINGS.read_text(encoding="utf-8")) if (names or check) and FINDINGS.exists() else {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        fresh = dict(zip(names or SPECIMENS, pool.map(partial(examine, only=check), names or SPECIMENS)))
    if check:
        for name, found in fresh.items():
            checks = {**kept[name]["checks"], **found["checks"]}
            found["checks"] = {known: checks[known] for known in CHECKS}
    return {name: {**kept, **fresh}[name] for name in SPECIMENS}


def examine(name: str, only: str | None = None) -> dict[str, Any]:
    """What the kit finds of one specimen, with all checks or with one."""
    sys.path[:0] = [str(ROOT / "tests" / "helpers")]
    from specimens import SPECIMENS

    from ddit_rt.families import family_of
    from ddit_rt.families.testing import CHECKS, run_check

    pipe = SPECIMENS[name].make()
    outcomes = {check: run_check(SPECIMENS[name], check) for check in ([only] if only else CHECKS)}
    print(name, file=sys.stderr)
    return {
        "family": family_of(pipe).name,
        "pipeline": type(pipe).__name__,
        "checks": {check: [outcome.verdict, outcome.reason] for check, outcome in outcomes.items()},
    }


def table(findings: dict[str, Any]) -> str:
    """Markdown: a row per specimen."""
    lines = ["| family | tried on | passes | does not |", "|---|---|---|---|"]
    for name, found in sorted(findings.items(), key=lambda item: (item[1]["family"], item[0])):
        verdicts = found["checks"].values()
        tried = sum(verdict in ("pass", "limit") for verdict, _ in verdicts)
        passed = sum(verdict == "pass" for verdict, _ in verdicts)
        limits = "; ".join(
            f"{check}: {reason}" for check, (verdict, reason) in found["checks"].items() if verdict == "limit"
        )
        lines.append(f"| `{found['family']}` | {name} ({found['pipeline']}) | {passed} of {tried} | {limits} |")
    return "\n".join(lines)


def write(findings: dict[str, Any]) -> None:
    """The findings, and the table on the page between its marks."""
    FINDINGS.write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(findings)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        write(find([], sys.argv[2]))
    else:
        write(find(sys.argv[1:]))
