"""The figures of the documentation's page on video: curves, clips side by side, and sheets of their frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluations import Evaluation
from readme_figures import schedule_of_settings

from ddit_rt.evaluate import Clip, beside, contact_sheet, generate, noise_seed, plot_curves, plot_frames, to_clip, webp
from ddit_rt.evaluate.settings import run_settings
from ddit_rt.pipeline import frame_rate, load_any
from ddit_rt.trajectories import psnr

ROW = {
    "base@50": "plain, 50 steps",
    "target-3x@50": "speedup=3",
    "fitted-3x@50": "fitted, 3x",
    "delta-2p-3@50": "2p, one in three full",
    "teacache-3x@50": "TeaCache, 3x",
    "17-steps@50": "17 plain steps, 3x",
}
"""Method -> its title; the plain one first."""

FIGURES = {
    "clips-*.webp": "Clips side by side, each over a mark per step: blue p, yellow 2p, red 4p, grey skipped",
    "frames-of-*.webp": "Frames of the plain clip, and of the same clip by other methods below it",
    "curve-psnr-*.webp": "PSNR against speed",
    "curve-warping-*.webp": "Warping error against speed",
    "curve-flicker-*.webp": "Flicker against speed",
    "frames-[0-9]*.webp": "PSNR of the frames along the clip",
}
"""Pattern of file names -> what they show, in the order of the page."""

MOVING = 4
"""How many of them stand beside each other in the animated row."""

PROMPTS = 2


def curves(evaluation: Evaluation, folder: Path, spread: Sequence[float]) -> None:
    """The curves that ``ddit-rt eval`` draws, and the error along the clip beside that of other seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = evaluation.summaries()
    plot_curves(summaries, folder, "webp")
    plot_frames(summaries, folder, "webp", spread)


def links(folder: Path, base: Path) -> str:
    """Markdown with those of the figures that are there, for a page in the folder ``base``."""
    found = []
    for pattern, text in FIGURES.items():
        for path in sorted(folder.glob(pattern)):
            found.append(f"![{text}]({path.relative_to(base).as_posix()})")
    return "\n\n".join(found)


def clips(evaluation: Evaluation, folder: Path, progress: Callable[[str], None]) -> None:
    """Runs the methods of :data:`ROW` on the first prompts again: an animated row of each, and a sheet of frames."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = evaluation.plan
    pipe = load_any(plan.model)
    methods = {method.name: method for method in plan.methods}
    shown = {name: title for name, title in ROW.items() if name in methods}
    for index, prompt in enumerate(plan.prompts[:PROMPTS]):
        frames: dict[str, Any] = {}
        for name in shown:
            progress(f"{name}: {prompt}")
            call = {**plan.call, "prompt": prompt, "num_inference_steps": methods[name].steps}
            seed = noise_seed(plan.seeds[0], index)
            frames[name] = generate(pipe, run_settings(methods[name]), seed, **call).frames
        base = frames[next(iter(shown))]
        titles = {
            name: title if frames[name] is base else f"{title}, {psnr(frames[name], base):.0f} dB"
            for name, title in shown.items()
        }
        found: dict[str, Clip] = {titles[name]: to_clip(clip) for name, clip in frames.items()}
        schedules = {titles[name]: schedule_of_settings(methods[name]) for name in shown}
        row = beside(dict(list(found.items())[:MOVING]), schedules)
        (folder / f"clips-{index}.webp").write_bytes(webp(row, frame_rate(plan.model)))
        contact_sheet(found).save(folder / f"frames-of-{index}.webp", quality=90)
