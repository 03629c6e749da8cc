"""Sums up the logs of :file:`run.sh`: what fails accelerated although it passes plain."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def failing(plain: dict[str, Any], accelerated: dict[str, Any]) -> dict[str, str]:
    """Tests that pass plain and do not pass accelerated: id -> what happened."""
    return {
        name: "; ".join(outcome["mismatches"]) or outcome["reason"]
        for name, outcome in accelerated["tests"].items()
        if outcome["outcome"] != "passed" and plain["tests"].get(name, {}).get("outcome") == "passed"
    }


def summary(plain: dict[str, Any], runs: list[dict[str, Any]]) -> tuple[str, bool]:
    """The summary as text, and whether calls were compared and nothing fails accelerated."""
    counts = Counter(outcome["outcome"] for outcome in plain["tests"].values())
    lines = [
        f"{len(plain['tests'])} tests; plain: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped"
    ]
    clean = True
    for run in runs:
        bad = failing(plain, run)
        clean &= not bad and run["calls"] > 0
        refusals = Counter(text for outcome in run["tests"].values() for text in outcome["refused"])
        lines.append(
            f"{run['mode']}: {len(bad)} failed that pass plain; {run['calls']} calls compared, "
            f"{run['raised']} of them raise the same error; {refusals.total()} refused"
        )
        lines += [f"  refused {times} times: {text}" for text, times in refusals.items()]
        lines += [f"  FAILED {name}: {reason}" for name, reason in bad.items()]
    return "\n".join(lines), clean


def main(folder: str) -> int:
    logs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")}
    plain = logs.pop("plain")
    text, clean = summary(plain, [logs[mode] for mode in sorted(logs, key=("exact", "coarse", "coarser").index)])
    print(text)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
