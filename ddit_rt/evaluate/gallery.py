"""A page with everything a sweep found: curves, table, and the same pictures by every method."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..pipeline import frame_rate
from .clips import read_clip, webp
from .columns import METRIC_NAMES
from .summary import Summary
from .sweep import Plan, holds_videos, pictures_of


def write_gallery(
    plan: Plan,
    folder: Path,
    summaries: Sequence[Summary],
    curves: Sequence[Path],
    machine: Mapping[str, Any],
    notes: Sequence[str] = (),
    prompts: int = 8,
    side: int = 128,
) -> Path:
    """Writes ``index.html``, which needs no other file.

    Args:
        curves: Figures to show.
        machine: As the plan's file has it.
        notes: On how to read the table.
        prompts: How many prompts to show; half as many of videos, whose thumbnails move.
        side: Longest side of a thumbnail, in pixels.
    """
    if holds_videos(plan, folder):
        prompts = -(-prompts // 2)
    fps = frame_rate(plan.model)
    methods = {method.name: method for method in plan.methods}
    names = [summary.method for summary in summaries]
    thumbnails = {
        name: {
            index: _url("webp", webp(read_clip(path), fps, side))
            for index, seed, path in pictures_of(folder, plan, methods[name])
            if index < prompts and seed == plan.seeds[0]
        }
        for name in names
    }
    page = Environment(loader=PackageLoader("ddit_rt.evaluate", "."), autoescape=True).get_template("gallery.html.j2")
    text = page.render(
        plan=plan,
        summaries=summaries,
        metrics={k: v for k, v in METRIC_NAMES.items() if any(k in summary.metrics for summary in summaries)},
        worst=[k for k in METRIC_NAMES if k.startswith("psnr") and any(k in summary.worst for summary in summaries)],
        curves=[_url(path.suffix[1:], path.read_bytes()) for path in curves],
        shown=list(enumerate(plan.prompts))[:prompts],
        thumbnails=thumbnails,
        machine=machine,
        notes=notes,
    )
    path = folder / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def _url(format: str, data: bytes) -> str:
    """A picture file as a data URL."""
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"
