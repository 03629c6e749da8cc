"""What `benchmarks/serve_suite.py` measured, in Markdown."""

from __future__ import annotations

from typing import Any


def serve_table(result: dict[str, Any]) -> str:
    """Load, batches, mix-ups, silence and memory, a paragraph or a table each."""
    versions = result["versions"]
    lines = [
        f"Demo model, {result['steps']} steps with guidance, one replica of one thread on {result['cpus']} CPU cores, "
        f"torch {versions['torch']}; `python benchmarks/serve_suite.py`. A load of 16 clients at once, sizes "
        f"{', '.join(result['sizes'])}, streamed:",
        "",
        "| | pictures / s (by round) | against plain | latency p50, p99, s | first preview p50, p99, s | done |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_load_line(one) for one in result["load"]]
    ratios = [one["ratio"] for one in result["batching"]]
    sizes = [rates["batch"] for one in result["batching"] for size, rates in one["rates"].items() if size != "1"]
    mixing, silence, memory = result["mixing"], result["silence"], result["memory"]
    held, free = (sorted(silence[f"seconds_{name}"])[1] for name in ("with", "without"))
    first, last = memory[4], memory[-1]
    parts = [f"{name} {first[name]:.0f} to {last[name]:.0f} MiB" for name in ("replica", "ingress", "proxy")]
    lines += [
        "",
        f"- **Batches** of up to 4 (mean {sum(sizes) / len(sizes):.1f}) against one at a time, 16 clients, by round: "
        f"{', '.join(f'{ratio:.2f}x' for ratio in ratios)} the pictures per second. A CPU thread is busy with one "
        "picture already; on a GPU nothing was measured.",
        f"- **Mixed load**: {mixing['requests']} requests, 16 at once, of three sizes, two numbers of steps and three "
        f"targets: {mixing['pictures']} pictures, each the one made alone with its seed, up to "
        f"{mixing['largest_difference_in_levels']} of 255 levels in "
        f"{100 * mixing['share_of_values_that_differ']:.4f} % of the values.",
        f"- **{silence['connections']} connections that send nothing**: a picture took {held:.2f} s with them and "
        f"{free:.2f} s without (medians of three).",
        f"- **Memory** from request {first['requests']} to {last['requests']}, every tenth client gone in mid-run: "
        f"{', '.join(parts)}; open files {first['files']:.0f} to {last['files']:.0f}.",
    ]
    return "\n".join(lines)


def _load_line(one: dict[str, Any]) -> str:
    rate, ratio = one["throughput"], one["against_plain"]
    cells = [
        "plain" if one["speedup"] == 1 else f"speedup {one['speedup']:g}",
        f"{rate['middle']:.2f} ({rate['least']:.2f} to {rate['most']:.2f})",
        "" if ratio is None else f"{ratio['middle']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})",
        *(f"{part['p50']:.1f}, {part['p99']:.1f}" for part in (one["latency"], one["first_partial"])),
        f"{one['completed']} of {one['sent']}",
    ]
    return f"| {' | '.join(cells)} |"
