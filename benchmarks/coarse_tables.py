"""What coarse steps are worth, in Markdown: what they know, and what they add to skipped steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from target_tables import p_shown


def news_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What ``ddit-rt analyse coarse`` found.

    Args:
        found: Model -> the lines of its coarse.json.
    """
    rows = [
        "| model | size: tokens | FLOP of a full step | steps since a full one | last prediction | best of earlier "
        "| with coarse runs | delta | news |",
        "|---" * 9 + "|",
    ]
    for model, lines in found.items():
        for line in lines:
            missed = [f"{line[name]:.2f}" for name in ("unchanged", "earlier", "with_coarse", "delta")]
            rows.append(
                f"| {model} | {line['multiple']}p: {line['tokens']} | {line['cost']:.3f} | {line['distance']} | "
                f"{' | '.join(missed)} | {100 * line['news']:.0f} % |"
            )
    return "\n".join(rows)


def gain_table(result: Mapping[str, Any]) -> str:
    """What coarse steps add to skipped ones, from the result of ``coarse_gain.py``, and that in a sentence."""
    ratios = ", ".join(f"{k}p {ratio:.3f}" for k, ratio in result["ratios"].items())
    lines = [
        f"{result['model']}, {result['prompts']} prompts, {result['steps']} steps; what coarse steps cost of a full "
        f"one: {ratios}. PSNR to plain in dB: mean (worst tenth).",
        "",
        "| asked | coarse steps by | skipped steps alone: p, skipped | speed-up | dB | with coarse steps: p, 2p, 4p, "
        "skipped | speed-up | dB | gain | 95 % interval | p | better on | these coarse steps skipped: dB | they bring "
        "| p |",
        "|---" * 15 + "|",
    ]
    said = []
    for line in result["lines"]:
        alone = line["skipped"]
        by = {"coarse": "delta", "adapter": "the adapter"}[line["by"]]
        cells = [f"{line['speedup']:g}x", by, _counts(alone, "10"), f"{alone['speedup']:.2f}x", _decibels(alone)]
        if "coarse" not in line:
            lines.append(f"| {' | '.join([*cells, 'the search takes none', *[''] * 9])} |")
            said.append(f"at {line['speedup']:g}x by {by} nothing, since the search takes none")
            continue
        mixed = line["coarse"]
        p = p_shown(line["p"])
        cells += [_counts(mixed, "1240"), f"{mixed['speedup']:.2f}x", _decibels(mixed), f"{line['difference']:+.1f}"]
        cells += [f"{line['low']:+.1f} to {line['high']:+.1f}", p, f"{line['better']} of {line['runs']}"]
        bare = line.get("without")
        cells += [_decibels(bare), f"{bare['difference']:+.1f}", p_shown(bare["p"])] if bare else [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
        said.append(f"at {line['speedup']:g}x by {by} {line['difference']:+.1f} dB (p {p})")
    return "\n".join([*lines, "", f"Coarse steps added to skipped steps alone: {'; '.join(said)}."])


def _counts(side: Mapping[str, Any], kinds: str) -> str:
    return ", ".join(str(side["steps"][kind]) for kind in kinds)


def _decibels(side: Mapping[str, Any]) -> str:
    return f"{side['psnr']:.1f} ({side['worst']:.1f})"
