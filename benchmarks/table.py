"""Kernel times as a Markdown table, from the newest result of every GPU under ``benchmarks/results``.

    python benchmarks/table.py [--into README.md]

``--into`` replaces what stands between ``<!-- kernel-table -->`` and ``<!-- /kernel-table -->`` in a file, so that
numbers there are generated, never typed. Results of dry runs are ignored.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- kernel-table -->", "<!-- /kernel-table -->"


def newest(results: Path) -> list[dict[str, Any]]:
    """The latest measured report of every GPU."""
    reports = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        measured = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels-*.json"))]
        measured = [report for report in measured if not report["dry_run"]]
        if measured:
            reports.append(max(measured, key=lambda report: report["machine"]["date"]))
    return reports


def table(report: dict[str, Any]) -> str:
    """One report: a line per case, a column per provider, device microseconds (median) and share of the ceiling."""
    machine, rows = report["machine"], {}
    for record in report["results"]:
        rows.setdefault((record["kernel"], record["case"]), {})[record["provider"]] = record
    lines = [
        f"{machine['gpu']}, PyTorch {machine['torch']}, Triton {machine['triton']}, {machine['date'][:10]}; measured "
        f"ceilings {report['ceilings']['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{report['ceilings']['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s.",
        "",
        "| kernel | case | ours, µs | of ceiling | others, µs |",
        "|---|---|---|---|---|",
    ]
    for (kernel, case), providers in rows.items():
        ours = providers.get("kernel", {})
        if "device" not in ours:
            continue
        others = [
            f"{name} {record['device']['median_us']:.1f}"
            for name, record in providers.items()
            if name != "kernel" and "device" in record
        ]
        time, share = ours["device"]["median_us"], ours["share_of_ceiling"]
        lines.append(f"| {kernel} | {case} | {time:.1f} | {share:.0%} | {', '.join(others)} |")
    return "\n".join(lines)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    reports = newest(options.results)
    text = "\n\n".join(map(table, reports)) or "No GPU has been measured yet; nothing is claimed for speed."
    if options.into is None:
        print(text)
        return 0
    document = options.into.read_text()
    if BEGIN not in document or END not in document:
        print(f"{options.into} lacks {BEGIN} ... {END}; add the two markers where the table belongs.", file=sys.stderr)
        return 1
    head, rest = document.split(BEGIN, 1)
    options.into.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
