"""The routes of ``paper_routes.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS = {
    "graphs, compiled": "{steps} full steps, compiled, from graphs",
    "schedule": "+ the schedule",
    "8 bits": "+ 8 bits (FP8; int8 on the A100)",
    "attention back-end": "+ attention by the best back-end",
    "QKV in one launch": "+ QKV in one launch",
    "modulation ahead": "+ modulation ahead",
    "short text in coarse steps": "+ text without padding in coarse steps",
    "guidance in one batch": "+ both calls of guidance in one batch in coarse steps",
    "attention in 8 bits": "+ attention in 8 bits",
}

SPARE_GB = 1.0
"""What graphs and latents take beside the weights, at least."""


def routes_table(routes: Mapping[str, Any]) -> str:
    """One table per model: a line per lever at the first schedule, then where the other schedules end."""
    parts = [
        "Computed, not measured: seconds of the denoising steps. Levers add up from line to line; the A100 has no "
        "published figure for attention in 8 bits. Sources: " + "; ".join(routes["sources"].values()) + "."
    ]
    for model in routes["models"].values():
        sizes = ", ".join(f"{size:.1f} GB in {name}" for name, size in model["weights_gb"].items())
        small = [gpu for gpu, size in routes["memory_gb"].items() if size < model["weights_gb"]["bf16"] + SPARE_GB]
        unfit = f"; in bf16 they do not fit the {' or '.join(small)}" if small else ""
        parts += ["", _table(model), "", f"Weights of its layers: {sizes}{unfit}. {_verdict(model)}"]
    return "\n".join(parts)


def _table(model: Mapping[str, Any]) -> str:
    first, *others = model["schedules"]
    gpus = list(first["every_wave_full"])
    lines = [f"| {model['title']} | {' | '.join(gpus)} |", "|---|" + "---|" * len(gpus)]
    for entry in first["levers"]:
        words = WORDS[entry["lever"]].format(steps=model["steps"])
        if entry["lever"] == "schedule":
            words = f"+ {_described(model, first)}"
        lines.append(_line(words, entry["seconds"]))
    lines.append(_line("every wave of tiles full (bound)", first["every_wave_full"]))
    lines.append(_line("the schedule and weights alone in 4 bits", first["weights_in_4_bits"]))
    for schedule in others:
        lines.append(_line(f"all of it at {_described(model, schedule)}", schedule["levers"][-1]["seconds"]))
        before = schedule["levers"][-2]["seconds"]
        lines.append(_line("the same with attention in 16 bits", before))
    ends = {gpu: sum(times.values()) for gpu, times in model["ends_s"].items()}
    lines.append(_line("text encoders and decoder beside it", ends))
    return "\n".join(lines)


def _described(model: Mapping[str, Any], schedule: Mapping[str, Any]) -> str:
    multiples = schedule["multiples"]
    if {2, 4} & set(multiples):
        counts = ", ".join(f"{multiples.count(k)} at {'p' if k == 1 else f'{k}p'}" for k in (1, 2, 4))
        return f"{schedule['name']} ({counts})"
    known = [f"{value:.1f} dB {by}" for by, value in schedule["demo_db"].items() if value is not None]
    quality = f"; demo model: {', '.join(known)}" if known else ""
    return f"{schedule['name']} ({multiples.count(1)} of {len(multiples)} steps run the model{quality})"


def _line(words: str, seconds: Mapping[str, float]) -> str:
    return f"| {words} | {' | '.join(f'{value:.2f}' for value in seconds.values())} |"


def _verdict(model: Mapping[str, Any]) -> str:
    """Which schedules reach the wanted time on the H200, and how far off what is computed may be."""
    errors = [check["published"] / check["computed"] for check in model["checks"]]
    low, high = min(1.0, *errors), max(1.0, *errors)
    parts = []
    for schedule in model["schedules"]:
        exact, eight = (schedule["levers"][at]["seconds"]["H200"] for at in (-2, -1))
        parts.append(
            f"{schedule['name']} takes {exact:.2f} s ({low * exact:.2f} to {high * exact:.2f}), "
            f"{eight:.2f} with attention in 8 bits ({low * eight:.2f} to {high * eight:.2f})"
        )
    checks = "; ".join(
        f"{check['what']} on {check['gpu']}: {check['published']:g} s, computed {check['computed']:g}"
        for check in model["checks"]
    )
    wanted = model["wanted_s"]
    return (
        f"Wanted on the H200: {wanted:g} s, which {_reached(model, -2)} with attention in 16 bits, and "
        f"{_reached(model, -1)} in 8. With everything, {'; '.join(parts)}. In brackets, what it would be if all were "
        f"off as the published times are from those computed for the same runs ({checks})."
    )


def _reached(model: Mapping[str, Any], at: int) -> str:
    """The first schedule that is quick enough, or how near the quickest comes."""
    times = {schedule["name"]: schedule["levers"][at]["seconds"]["H200"] for schedule in model["schedules"]}
    fast = [name for name, seconds in times.items() if seconds <= model["wanted_s"]]
    name = min(times, key=times.__getitem__)
    return f"is reached at {' and '.join(fast)}" if fast else f"nothing reaches ({name} takes {times[name]:.2f} s)"
