"""Measurements as Markdown tables, from all that lies under ``benchmarks/results``.

    python benchmarks/table.py

Kernels beside their baselines, pipelines beside the records of others and the project's targets. Results of dry runs
are ignored.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipe_targets import RECORDS, ends_s, find, quickest, verdicts

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = {"flux": 28, "wan": 50}


def read(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Part and content of every measured file, GPU by GPU."""
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        for part in ("kernels", *RECORDS):
            path = folder / f"{part}.json"
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"dry_run": True}
            if not content["dry_run"]:
                found.append((part, content))
    return found


def _where(content: dict[str, Any]) -> str:
    """GPU, versions and days; says so where rows differ in their versions."""
    seen = {json.dumps(row["versions"], sort_keys=True) for row in content["rows"]}
    newest = max(content["rows"], key=lambda row: row["date"])
    versions = newest["versions"]
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers", "torchao") if versions[name]
    )
    others = "" if len(seen) == 1 else f"; some rows with {len(seen) - 1} other sets of versions"
    commit = f", commit {newest['commit'][:10]}" if newest["commit"] else ""
    return f"{content['machine']['gpu']}, {named}{commit}, {newest['date'][:10]}{others}"


def kernels(content: dict[str, Any]) -> str:
    """A line per case: device microseconds (median), share of the ceiling, and the other providers' times."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in content["rows"]:
        rows.setdefault((record["kernel"], record["case"]), {})[record["provider"]] = record
    ceilings = content["ceilings"]
    lines = [
        f"Kernels: {_where(content)}; measured ceilings {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{ceilings['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s.",
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


def described(multiples: Sequence[int]) -> str:
    """A schedule in words: ``4 p, 2 4p, 1 p``."""
    groups = ((k, len(list(group))) for k, group in itertools.groupby(multiples))
    return ", ".join(f"{count} {_size(k)}" for k, count in groups)


def _size(multiple: int) -> str:
    return {0: "skipped", 1: "p"}.get(multiple, f"{multiple}p")


def _cell(value: Any, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _step_ms(row: dict[str, Any]) -> str:
    times = row["step_ms"]["repeating"]
    return ", ".join(f"{_size(int(k))} {value['median']:.1f}" for k, value in times.items())


def pipeline(model: str, content: dict[str, Any]) -> str:
    """Every row, the schedules, the records of others, the targets."""
    rows, gpu, steps = content["rows"], content["machine"]["gpu"], STEPS[model]
    lines = [
        f"{content['what']['title']}: {_where(content)}; {content['what']['weights']} weights, denoising only.",
        "",
        "| provider | schedule | steps | s | wall-clock | by FLOP | ms a step | between steps, µs | GiB | graphs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['provider']} | {row['schedule']} | {row['steps']} |"
        missing = row.get("error") or row.get("skipped")
        if missing:
            lines.append(f"{head} {missing[:80].replace('|', '/')} | | | | | | |")
            continue
        if row["provider"] == "ends":
            lines.append(f"{head} {row['wall_s']['median']:.2f} | | | | | | |")
            continue
        if "graphs" in row["provider"] and "eager" in row["executed"]:
            head = head.replace(" |", " (fell back to eager) |", 1)
        plain = find(rows, "stock", "p", row["steps"])
        wall = row["wall_s"]["median"]
        clock = None if plain is None else plain["wall_s"]["median"] / wall
        gap = None if row["gap_us"] is None else row["gap_us"]["median"]
        lines.append(
            f"{head} {wall:.2f} | {_cell(clock)} | {_cell(row.get('flop_speedup'))} | {_step_ms(row)} | "
            f"{_cell(gap, '.0f')} | {_cell(row['peak_gib'], '.1f')} | {_cell(row['graph_pool_gib'])} |"
        )
    mixes = {(row["steps"], tuple(row["multiples"])) for row in rows if row["schedule"] == "mixed" and "wall_s" in row}
    lines += ["", *(f"Mixed, {count} steps, by hand: {described(multiples)}." for count, multiples in sorted(mixes))]
    best = quickest(rows, steps)
    ours, ends = "not measured", ends_s(rows)
    if best is not None:
        denoising = best["wall_s"]["median"]
        request = "" if ends is None else f", {denoising + ends:.2f} s with text encoders and decoder"
        ours = f"{denoising:.2f} s denoising{request} ({best['provider']}, mixed)"
    lines += ["", f"{steps} steps: ours {ours}. Published, whole requests unless said:", ""]
    lines += [f"- {r.gpu}, {r.what}: {r.seconds:g} s{' (to beat)' if r.to_beat else ''}" for r in RECORDS[model]]
    lines += ["", "Targets:", "", *(f"- {verdict}" for verdict in verdicts(model, gpu, steps, rows))]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    tables = [
        kernels(content) if part == "kernels" else pipeline(part, content) for part, content in read(options.results)
    ]
    text = "\n\n".join(tables) or "No GPU has been measured yet; nothing is claimed for speed."
    print(text)


if __name__ == "__main__":
    main()
