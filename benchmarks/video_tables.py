"""The tables of the documentation's page on video, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluations import Evaluation
from readme_tables import CONVERGED, OURS, guidance_of, with_spread

from ddit_rt.evaluate import CLIP

HEADS = {
    "growth": "growth, dB",
    "flicker": "flicker",
    "warping": "warping x 1000",
    "smoothness": "smoothness",
    "consistency": "consistency",
}
FORMS = {"growth": "+.1f", "flicker": ".3f", "warping": "+.2f", "smoothness": ".4f", "consistency": ".4f"}


def video_table(evaluation: Evaluation, reference: int) -> str:
    """Every method that is compared with ``reference`` plain steps, the one of the fewest FLOP last."""
    rows = sorted(evaluation.summaries(reference), key=lambda row: row.flops_speedup or 0)
    metrics = [name for name in CLIP if any(name in row.metrics for row in rows)]
    lpips = any("lpips" in row.metrics for row in rows)
    second = any(CONVERGED in row.metrics for row in rows)
    heads = ["method", "wall-clock", "FLOP", "PSNR, dB", "worst tenth", "SSIM", *["LPIPS"] * lpips]
    heads += [*(HEADS[name] for name in metrics), *["PSNR to converged, dB"] * second]
    lines = [
        f"{len(evaluation.plan.prompts)} prompts, {reference} steps, {guidance_of(evaluation)}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in rows:
        name = row.method.replace(f"@{reference}", "")
        cells = [
            f"**{name}**" if row.kind.startswith(OURS) else name,
            f"{row.speedup:.2f}x",
            "" if row.flops_speedup is None else f"{row.flops_speedup:.2f}x",
            with_spread(row, "psnr"),
            _value(row.worst, "psnr", ".1f"),
            _value(row.metrics, "ssim", ".3f"),
            *[_value(row.metrics, "lpips", ".4f")] * lpips,
            *(_value(row.metrics, name, FORMS[name]) for name in metrics),
            *[with_spread(row, CONVERGED)] * second,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tau_table(evaluation: Evaluation, reference: int) -> str:
    """The threshold rule at the paper's τ and at those that were calibrated to this model."""
    settings = {method.name: method.settings or {} for method in evaluation.plan.methods}
    rows = ["| rule | τ | FLOP | PSNR, dB | worst tenth |", "|---|---|---|---|---|"]
    for row in evaluation.summaries(reference):
        given = settings[row.method]
        # caches run every step in full, at a τ that nothing lies below
        if given.get("threshold") and row.kind.startswith("DDiT"):
            rows.append(
                f"| {row.method.replace(f'@{reference}', '')} | {given['threshold']:.2g} | {row.flops_speedup:.2f}x | "
                f"{with_spread(row, 'psnr')} | {_value(row.worst, 'psnr', '.1f')} |"
            )
    return "\n".join(rows)


def growth_table(evaluation: Evaluation, reference: int, spread: Mapping[str, Any]) -> str:
    """Which methods' errors grow along the clip by more than 1 dB over what clips of two seeds differ by."""
    rows = [row for row in evaluation.summaries(reference) if "growth" in row.metrics]
    limit = spread["growth"] + 1
    over = [row for row in rows if row.metrics["growth"] > limit]
    names = ", ".join(f"{row.method.replace(f'@{reference}', '')} ({row.metrics['growth']:+.1f})" for row in over)
    return (
        f"Plain clips of one prompt and two seeds grow apart by {round(spread['growth'], 1) + 0.0:+.1f} ± "
        f"{spread['growth_spread']:.1f} dB from the first frame to the last ({len(spread['clips'])} prompts). Of "
        f"{len(rows)} methods {len(rows) - len(over)} stay within {limit:+.1f} dB"
        f"{'; the others: ' + names if over else ''}."
    )


def longer_table(result: Mapping[str, Any]) -> str:
    """Clips of several lengths in the time of the plain one, from the result of ``longer_video.py``."""
    names = [name for name in ("psnr", "ssim", *CLIP) if any(name in _rows(line) for line in result["lines"])]
    heads = {"psnr": "PSNR, dB", "ssim": "SSIM", **HEADS}
    lines = [
        f"{result['model']}, {result['prompts']} prompts, {result['steps']} steps. Against the plain model at the same "
        "length; times the plain clip's seconds; MB live at once in a call beside the weights.",
        "",
        f"| frames | run | FLOP | seconds | of the plain clip's | worst tenth, dB | "
        f"{' | '.join(heads[name] for name in names)} | MB |",
        "|---" * (7 + len(names)) + "|",
    ]
    plain = result["lines"][0]["methods"]["plain"]["seconds"]
    for line in result["lines"]:
        for name, row in line["methods"].items():
            flops = row["flops_speedup"]
            live = line["bytes"].get(name)
            cells = [
                str(line["frames"]),
                f"{name}, {line['wanted']:.2f}x wanted" if name != "plain" else name,
                "" if flops is None else f"{flops:.2f}x",
                f"{row['seconds']:.1f}",
                f"{row['seconds'] / plain:.2f}x",
                _value(row, "worst", ".1f"),
                *(_value(row, key, {"psnr": ".1f", "ssim": ".3f", **FORMS}[key]) for key in names),
                "" if live is None else f"{live / 1e6:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if line["wanted"] > 1 and line["schedule"] is None:
            lines.append(
                f"| {line['frames']} | no schedule is {line['wanted']:.2f}x as fast |{' |' * (5 + len(names))}"
            )
    return "\n".join(lines)


def _rows(line: Mapping[str, Any]) -> set[str]:
    """What is known of any of a length's methods."""
    return {name for row in line["methods"].values() for name in row}


def _value(values: Mapping[str, float], name: str, form: str) -> str:
    """A value, or a dash where there is none: the plain clip has no distance from itself."""
    if name not in values:
        return "-"
    return format(values[name] * (1000 if name == "warping" else 1), form)
