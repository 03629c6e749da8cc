"""Targets beside the best of all baselines that cost at most a tenth more, against both references, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluations import Evaluation

from ddit_rt.evaluate import TO_CONVERGED, Summary, compare

CONVERGED = TO_CONVERGED["psnr"]
REFERENCES = {
    "psnr": ("the plain picture", {"target": "rule", "fitted": "fitted"}),
    CONVERGED: ("the converged picture", {"converged": "rule", "fitted-converged": "fitted"}),
}
"""Metric -> what it measures the distance to, and how the methods that aim at it are called and chosen."""

OURS = ("DDiT",)
"""How the kinds of our own methods begin."""

DEARER = 1.1
"""A baseline may spend so many times our FLOP, since few can be set to the same."""


def targets_table(evaluation: Evaluation, steps: int) -> str:
    """One table per reference: a line per speed-up.

    Args:
        evaluation: With the methods of ``benchmarks/targets.json``.
        steps: Of the plain pipeline.
    """
    rows = evaluation.summaries(steps)
    plain = next(row for row in rows if row.kind == "base")
    count = len(evaluation.plan.prompts)
    guidance = evaluation.plan.call.get("true_cfg_scale", 3.0)
    how = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
    parts = [f"{count} prompts, {steps} steps, {how}. PSNR in dB: mean (mean of the worst tenth)."]
    for metric, (reference, names) in REFERENCES.items():
        parts += ["", f"Distance to {reference}:", ""]
        parts += [
            "| asked | by | FLOP | ours | best baseline, at most 1.1 times the cost | its FLOP | its dB | gain | p |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        if metric == CONVERGED:
            parts.append(f"| plain pipeline | | 1.00x | {_decibels(plain, metric)} | | | | | |")
        asked = [row.method.split("@")[0].rpartition("-") for row in rows]
        ours = [(label, names[name], row) for (name, _, label), row in zip(asked, rows) if name in names]
        # each speed-up by the rule, then as it was fitted
        for label, by, row in sorted(ours, key=lambda item: (float(item[0].rstrip("x")), item[1] != "rule")):
            parts.append(_line(evaluation, rows, row, metric, label, by))
    return "\n".join(parts)


def between_table(evaluation: Evaluation, steps: int) -> str:
    """Runs that aim between the plain and the converged picture, beside those that aim at either.

    Args:
        evaluation, steps: As for :func:`targets_table`.
    """
    rows = {row.method: row for row in evaluation.summaries(steps)}
    plain = next(row for row in rows.values() if row.kind == "base")
    lines: dict[str, list[tuple[str, str, Summary]]] = {}  # asked -> by, what it aims at, and the run
    for method in evaluation.plan.methods:
        share = (method.settings or {}).get("toward_converged")
        if share is None or method.name not in rows:
            continue
        own = method.name.removeprefix(f"toward-{share:g}-")  # named after the method that aims at plain
        name, _, asked = own.split("@")[0].rpartition("-")
        by, found = REFERENCES["psnr"][1][name], lines.setdefault(asked, [])
        if (by, "0", rows[own]) not in found:
            found.append((by, "0", rows[own]))
        found.append((by, f"{share:g}", rows[method.name]))
    parts = [
        "| asked | by | `toward_converged` | dB to plain | dB to converged | nearer to converged than plain is |",
        "|---|---|---|---|---|---|",
        f"| plain pipeline | | | | {_decibels(plain, CONVERGED)} | |",
    ]
    for asked, found in sorted(lines.items()):
        aims_at_converged = ("rule", '`reference="converged"`', rows[f"converged-{asked}@{steps}"])
        for by, aim, row in [*sorted(found, key=lambda line: line[:2]), aims_at_converged]:
            cells = [asked, by, aim, _decibels(row, "psnr"), _decibels(row, CONVERGED)]
            parts.append(f"| {' | '.join(cells)} | {_nearer(evaluation, row.method, plain.method)} |")
    return "\n".join(parts)


def _nearer(evaluation: Evaluation, own: str, plain: str) -> str:
    """On how many prompts a method ends nearer to the converged picture than the plain pipeline."""
    ends: dict[str, dict[tuple[int, int], float]] = {own: {}, plain: {}}
    for row in evaluation.rows:
        if row["method"] in ends and CONVERGED in row:
            ends[row["method"]][row["prompt"], row["seed"]] = row[CONVERGED]
    pairs = [(ends[own][key], ends[plain][key]) for key in ends[plain]]
    return f"{sum(a > b for a, b in pairs)} of {len(pairs)}"


def _line(evaluation: Evaluation, rows: Sequence[Summary], own: Summary, metric: str, asked: str, by: str) -> str:
    assert own.flops is not None
    others = [
        row
        for row in rows
        if row.kind != "base" and not row.kind.startswith(OURS) and (row.flops or 0) <= DEARER * own.flops
    ]
    cells = [asked, by, f"{own.flops_speedup:.2f}x", _decibels(own, metric)]
    if others:
        best = max(others, key=lambda row: row.metrics[metric])
        found = compare(evaluation.rows, own.method, best.method, metric)
        cells += [best.method.split("@")[0], f"{best.flops_speedup:.2f}x", _decibels(best, metric)]
        cells += ["-", "-"] if found is None else [f"{found.difference:+.1f}", p_shown(found.p)]
    else:
        cells += ["none", "", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _decibels(row: Summary, metric: str) -> str:
    return f"{row.metrics[metric]:.1f} ({row.worst[metric]:.1f})"


def p_shown(p: float) -> str:
    """A p-value for a table."""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def misses_table(lines: Sequence[dict[str, float]]) -> str:
    """What ``ddit-rt analyse misses`` found."""
    rows = [
        "| speed-up | PSNR, dB: mean (least to largest) | largest miss ÷ least | rank correlation with PSNR | p |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        rows.append(
            f"| {line['speedup']:g}x | {line['psnr']:.1f} ({line['psnr_low']:.1f} to {line['psnr_high']:.1f}) | "
            f"{line['spread']:.2f} | {line['correlation']:+.2f} | {line['p']:.2g} |"
        )
    return "\n".join(rows)


def adapting_table(runs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """What ``benchmarks/adapting.py`` found, for several numbers of steps."""
    rows = [
        "| steps | evaluations, mean | fixed: rule | fixed: fitted | by an oracle | by misses of the whole run "
        "| by those of its first third | by a probe | rank correlation: misses | probe "
        "| own placement |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in (line for lines in runs for line in sorted(lines, key=lambda line: -line["evaluations"])):
        cells = [str(line["steps"]), str(line["evaluations"])]
        for name in ("fixed", "fitted", "oracle", "whole", "third", "probed"):
            found = line.get(name)
            cells.append("" if found is None else f"{found['psnr']:.1f} ({found['worst']:.1f})")
        cells += [f"{line[name]:+.2f}" for name in ("correlation", "probe correlation")]
        cells.append(f"{line['own placement']:+.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def joint_table(result: dict[str, Any]) -> str:
    """What ``benchmarks/joint_weights.py`` found."""
    rows = [
        f"{result['evaluations']} evaluations of {result['steps']} steps, guidance {result['guidance']:g}. PSNR to the "
        f"{result['reference']} picture in dB: mean (mean of the worst tenth).\n",
        f"| fitted | numbers | {result['prompts']} prompts of the fit | {result['others']} others "
        "| gain | better on | p |",
        "|---|---|---|---|---|---|---|",
    ]
    own = result["rows"][0]["others"]["psnr"]
    for row in result["rows"]:
        cells = [row["which"], str(row["numbers"])]
        cells += [f"{row[name]['psnr']:.1f} ({row[name]['worst']:.1f})" for name in ("fit", "others")]
        cells += ["", "", ""]
        if "p" in row:
            gain = row["others"]["psnr"] - own
            cells[-3:] = [f"{gain:+.1f}", f"{row['better']} of {result['others']}", f"{row['p']:.2g}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
