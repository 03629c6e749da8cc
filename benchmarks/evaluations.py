"""Finished evaluations as one small file each, with what tables, paired comparisons and curves need.

    python benchmarks/evaluations.py RUN FILE

condenses the folder RUN into FILE. Of ``ddit-rt eval MODEL --output RUN`` it keeps, per method, the settings, the FLOP,
the mean and spread of what judges said of the pictures, of videos the mean PSNR of every frame, and per prompt and seed
the seconds, those of the plain run beside it, and the metrics. Of ``ddit-rt analyse ... --output RUN`` it keeps the
lines, and of every step of a report its multiple and its σ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddit_rt.evaluate import COMPARED, PLAN, Plan, Summary, read_rows, summarise
from ddit_rt.schedule import Report, StepRecord

PER_RUN = ("seconds", "reference_seconds", *COMPARED)
DIGITS = 6
"""Significant digits that are kept of a measured value."""


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        machine: What the timings depend on.
        plan: Methods, prompts, seeds and call.
        rows: One per method, prompt and seed, and one per method with its FLOP, as :func:`summarise` takes them.
        judged: Method -> metric -> mean and standard deviation of what a judge said of the pictures.
        frames: Method -> of videos, the mean PSNR of every frame to the plain clip's, in dB.
    """

    machine: dict[str, Any]
    plan: Plan
    rows: list[dict[str, Any]]
    judged: dict[str, dict[str, tuple[float, float]]]
    frames: dict[str, list[float]]

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Reads what :func:`condense` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["methods"]
        names = ("name", "kind", "steps", "reference", "settings")
        methods = [{name: entry[name] for name in names} for entry in entries]
        plan = Plan.from_dict({**content["plan"], "methods": methods})
        keys = [(prompt, seed) for prompt in range(len(plan.prompts)) for seed in plan.seeds]
        rows: list[dict[str, Any]] = []
        for entry in entries:
            rows.append({"method": entry["name"], "flops": entry["flops"]})
            columns = entry["runs"]
            for i, (prompt, seed) in enumerate(keys):
                values = {name: column[i] for name, column in columns.items()}
                rows.append({"method": entry["name"], "prompt": prompt, "seed": seed, **values})
        judged = {entry["name"]: entry["judged"] for entry in entries}
        return cls(
            content["machine"], plan, rows, judged, {entry["name"]: entry.get("frames", []) for entry in entries}
        )

    def summaries(self, reference: int | None = None) -> list[Summary]:
        """One summary per method, judges' metrics included; ``reference`` keeps those compared with so many steps."""
        found = summarise(self.plan, self.rows)
        for summary in found:
            for name, (mean, spread) in self.judged[summary.method].items():
                summary.metrics[name], summary.spread[name] = mean, spread
            summary.frames = self.frames[summary.method]
        return [summary for summary in found if reference in (None, summary.reference)]


def condense(run: Path, target: Path) -> None:
    """Writes the evaluation in the folder ``run`` as the file ``target``.

    Raises:
        SystemExit: a run is missing, or the folder has no results yet.
    """
    plan = Plan.read(run)
    if not (run / "results.json").is_file():
        raise SystemExit(f"{run} has no results.json: ddit-rt eval {plan.model} --output {run} --report writes it.")
    results = {row["method"]: row for row in json.loads((run / "results.json").read_text("utf-8"))["results"]}
    rows: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    flops: dict[str, float | None] = {}
    for row in read_rows(run):
        if "flops" in row:
            flops[row["method"]] = row["flops"]
        else:
            rows.setdefault(row["method"], {})[row["prompt"], row["seed"]] = row
    keys = [(prompt, seed) for prompt in range(len(plan.prompts)) for seed in plan.seeds]
    entries = []
    for method in plan.methods:
        missing = [key for key in keys if key not in rows.get(method.name, {})]
        if missing:
            raise SystemExit(f"{method.name} lacks {len(missing)} of {len(keys)} runs: finish the evaluation first.")
        own = [rows[method.name][key] for key in keys]
        summary = results[method.name]
        entries.append(
            {
                **method.to_dict(),
                "flops": flops.get(method.name),
                "judged": {
                    name: (_short(mean), _short(summary["spread"].get(name, 0.0)))
                    for name, mean in summary["metrics"].items()
                    if name not in COMPARED
                },
                **({"frames": [_short(value) for value in summary["frames"]]} if summary.get("frames") else {}),
                "runs": {name: [_short(row[name]) for row in own] for name in PER_RUN if name in own[0]},
            }
        )
    machine = json.loads((run / PLAN).read_text(encoding="utf-8"))["machine"]
    shared = {name: value for name, value in plan.to_dict().items() if name != "methods"}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_text(machine, shared, entries), encoding="utf-8")


def condense_analyses(run: Path, target: Path) -> None:
    """Writes the analyses in the folder ``run`` as the file ``target``."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            found[path.stem] = [
                {k: _short(v) if isinstance(v, float) else v for k, v in line.items()} for line in content
            ]
            continue
        found[path.stem] = {
            prompt: {
                "config": {name: report["config"][name] for name in ("multiples", "threshold")},
                "schedule": [step["multiple"] for step in report["steps"]],
                "patch_std": [{k: _short(v) for k, v in step["patch_std"].items()} for step in report["steps"]],
            }
            for prompt, report in content.items()
        }
    lines = ",\n".join(f'"{name}": {json.dumps(content, ensure_ascii=False)}' for name, content in found.items())
    target.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def read_reports(content: dict[str, Any]) -> dict[str, Report]:
    """Prompt -> report with what figures show of it, from an entry of a file of analyses."""
    reports = {}
    for prompt, found in content.items():
        deviations = ({int(k): sigma for k, sigma in step.items()} for step in found["patch_std"])
        steps = [
            StepRecord(index, 0.0, 0.0, multiple, 0, patch_std)
            for index, (multiple, patch_std) in enumerate(zip(found["schedule"], deviations, strict=True))
        ]
        reports[prompt] = Report(steps, found["config"], complete=True)
    return reports


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _text(machine: dict[str, Any], plan: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """JSON with a line per method, so that a later change shows as the lines of the methods that changed."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    head = f'"machine": {json.dumps(machine)},\n"plan": {json.dumps(plan, ensure_ascii=False)},\n'
    return "{\n" + head + f'"methods": [\n{lines}\n]\n' + "}\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    run, target = map(Path, sys.argv[1:])
    (condense if (run / PLAN).is_file() else condense_analyses)(run, target)
