"""What ``ddit-rt demo --video`` shows: clips beside the plain pipeline's own, with the strips of their patch sizes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..evaluate import (
    MetricUnavailableError,
    beside,
    contact_sheet,
    error_growth,
    flicker,
    psnr_of_frames,
    save_clip,
    to_clip,
    warping,
)
from ..pipeline import DEMO_VIDEO, call_defaults, example_prompts, frame_rate
from ..schedule import one_in
from ..trajectories import Outcome, can_encode, psnr, ssim
from .running import Runner, check_numbers, started, timed, write_page

SHOWN = 2
"""How many of the model's prompts."""

COARSE = "one full step in three, the others at 2p"

SCALE = 2  # of the clips' pixels on the page

_CELLS = {
    "psnr": (1, ".1f"),
    "ssim": (1, ".3f"),
    "growth": (1, "+.1f"),
    "flicker": (1, ".2f"),
    "warping": (1000, "+.2f"),
}
"""Value -> by how much it is multiplied to be read, and its form."""


def _rows(steps: int) -> dict[str, dict[str, Any]]:
    """Row -> arguments of ``accelerate``."""
    return {
        "speedup=3": {"speedup": 3.0},
        "speedup=5": {"speedup": 5.0},
        COARSE: {"schedule": one_in(steps, 3, 2), "coarse": "delta"},
    }


def run_video_showcase(
    pipe: Any, output: Path, *, steps: int | None = None, seed: int = 0, repeats: int = 1, model: str = DEMO_VIDEO
) -> dict[str, Any]:
    """Runs the demo and writes clips, sheets of frames, ``demo.json`` and ``index.html`` into ``output``.

    Args:
        pipe: The model's pipeline.
        output: Folder, made if missing.
        steps: Denoising steps, at least 10; None takes the model's own.
        seed: Of the noise, the same for all runs.
        repeats: Timed runs of every row, in turns; the median counts.
        model: Name or folder of the model, whose demo.json says how it is called: with height, width, num_frames and
            num_inference_steps.

    Returns:
        Everything measured, JSON-ready; ``warping`` is None where OpenCV is missing.

    Raises:
        ConfigError: too few steps or repeats.
    """
    call = call_defaults(model)
    steps = int(call["num_inference_steps"]) if steps is None else steps
    check_numbers(steps, repeats, 10, "so that a fifth of them are two")
    output.mkdir(parents=True, exist_ok=True)
    shown = dict(itertools.islice(example_prompts(model).items(), SHOWN))
    fps, score = frame_rate(model), _scores()
    runs = len(shown) * repeats * (1 + len(_rows(steps)))
    with started(pipe, runs, {**call, "num_inference_steps": steps}, seed) as run:
        prompts = {name: _prompt(run, output, name, text, steps, repeats, fps, score) for name, text in shown.items()}
    clip = {"fps": fps, **{name: call[name] for name in ("num_frames", "height", "width")}}
    return write_page(pipe, output, "video.html.j2", steps, seed, clip=clip, prompts=prompts, mp4=can_encode())


Scores = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]


def _scores() -> Scores:
    """All that a clip is compared with the plain one by."""
    try:
        warped = warping()
    except MetricUnavailableError:
        warped = None

    def score(clip: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
        return {
            "psnr": psnr(clip, plain),
            "ssim": ssim(clip, plain),
            "psnr_frames": psnr_of_frames(clip, plain),
            "growth": error_growth(clip, plain),
            "flicker": flicker(clip, plain),
            "warping": None if warped is None else warped(clip, plain),
        }

    return score


def _prompt(
    run: Runner, output: Path, name: str, prompt: str, steps: int, repeats: int, fps: int, score: Scores
) -> dict[str, Any]:
    """One prompt by the plain pipeline and every row, in turns."""
    outcomes = run.in_turns(name, prompt, _rows(steps), repeats)
    plain = outcomes["plain"][0].frames
    rows = {
        row: timed(made, outcomes["plain"])
        | (dict.fromkeys(_CELLS) if row == "plain" else score(made[0].frames, plain))
        for row, made in outcomes.items()
    }
    return {"prompt": prompt, "rows": rows, "clips": _clips(output, name, outcomes, rows, fps)}


def _clips(
    output: Path,
    name: str,
    outcomes: Mapping[str, list[Outcome]],
    rows: Mapping[str, Mapping[str, Any]],
    fps: int,
) -> dict[str, str]:
    """Writes all rows side by side as .gif and, if it can be encoded, as .mp4, and a sheet of frames; their names."""
    titles = {row: "plain" if row == "plain" else f"{row.split(',')[0]}: {rows[row]['psnr']:.0f} dB" for row in rows}
    clips = {titles[row]: to_clip(made[0].frames) for row, made in outcomes.items()}
    moving = beside(clips, {titles[row]: values["schedule"] for row, values in rows.items()}, SCALE)
    files = {suffix: f"{name}.{suffix}" for suffix in ("gif", "mp4") if suffix == "gif" or can_encode()}
    for file in files.values():
        save_clip(moving, output / file, fps)
    contact_sheet(clips).save(output / f"{name}-frames.png")
    return {**files, "sheet": f"{name}-frames.png"}


def print_video_summary(result: Mapping[str, Any], console: Console) -> None:
    """The demo's tables, for people."""
    for entry in result["prompts"].values():
        table = Table(title=entry["prompt"])
        table.add_column("accelerate(pipe, ...)", overflow="fold")
        for heading in ("s", "clock", "FLOP", "dB", "SSIM", "growth", "flicker", "warping"):
            table.add_column(heading, no_wrap=True)
        for row, values in entry["rows"].items():
            plain = row == "plain"
            table.add_row(
                "not called: the plain pipeline" if plain else row,
                f"{statistics.median(values['seconds']):.2f}",
                f"{values['speedup_wall_clock']:.2f}x",
                f"{values['speedup_flop']:.2f}x",
                *("" if values[key] is None else f"{values[key] * by:{form}}" for key, (by, form) in _CELLS.items()),
            )
        console.print(table)
    console.print(
        "dB and SSIM to the plain clip; growth: dB that a frame's likeness falls from the first frame to the last; "
        "flicker: over the plain clip's; warping: error along the plain clip's motion, less its own, x 1000"
    )
    console.print(f"clips, frames and schedules: {result['page']}")
