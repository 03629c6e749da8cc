"""What programs share that fit schedules on some prompts of a model and compare them on others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ddit_rt.evaluate import CLIP, MetricUnavailableError, load_prompts
from ddit_rt.pipeline import makes_videos

SHOWN = ("psnr", "ssim", "growth", "flicker", "warping")


def parser_of(text: str | None, models: str, count: int, apart: int) -> argparse.ArgumentParser:
    """Their options.

    Args:
        text: The program's docstring.
        models: What MODEL can be.
        count, apart: Prompts to compare and to fit on, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("model", help=models)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for fits, rows and the result; continued if begun"
    )
    parser.add_argument("--prompts", help="as for ddit-rt eval; by default the model's own captions")
    parser.add_argument("--count", type=int, default=count, help="prompts to compare on")
    parser.add_argument("--apart", type=int, default=apart, help="further prompts, to fit on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--into", type=Path, help="file for the result")
    return parser


def prompts_of(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Those to compare on, and those to fit on.

    Raises:
        SystemExit: there are too few.
    """
    prompts = load_prompts(options.prompts or options.model, options.count + options.apart)
    if len(prompts) < options.count + options.apart:
        raise SystemExit(f"{len(prompts)} prompts: --count {options.count} and --apart {options.apart} ask for more.")
    return prompts[: options.count], prompts[options.count :]


def metrics_for(pipe: Any) -> list[str]:
    """Those of :data:`SHOWN` that can be had here."""
    usable = []
    for name in SHOWN:
        try:
            if name in CLIP and (not makes_videos(pipe) or CLIP[name]() is None):
                continue
        except MetricUnavailableError as error:
            print(f"left out {name}: {error}")
            continue
        usable.append(name)
    return usable


def write(result: Any, options: argparse.Namespace, name: str) -> None:
    """Writes a result as JSON into the output folder, under ``name``, and where ``--into`` says."""
    for path in (options.output / name, *([options.into] if options.into is not None else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
