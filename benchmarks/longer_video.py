"""Longer videos in the time of a plain clip: schedules fitted at every length, and what they do to the clip.

    python benchmarks/longer_video.py demo-video --output runs/longer --into benchmarks/results/demo-video/longer.json

A clip of N times the latent frames costs more than N times the plain one. At every length a schedule is fitted that
saves as much FLOP as brings it back to the plain clip's, beside the rule that needs no measurement, and both are
compared with the plain model at that length. Memory is that of the tensors which live at once in a pipeline's call
(``live_memory.py``). It can be stopped and started again. ``paper_longer.py`` computes the same for Wan 2.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from fitted_runs import metrics_for, parser_of, prompts_of, write
from live_memory import LiveMemory
from video_tables import longer_table

from ddit_rt.cli.options import read_numbers
from ddit_rt.errors import DDiTError, OutOfReachError
from ddit_rt.evaluate import Method, Plan, Summary, generate, read_rows, run_sweep, summarise
from ddit_rt.families import denoisers, family_of
from ddit_rt.fitting import fit_schedule
from ddit_rt.pipeline import call_defaults, load_any

FITS, RESULT = "fits.json", "longer.json"
PLAIN, RULE, FITTED = "plain", "rule", "fitted"
BRIEF = 6
"""Steps of the runs that memory is measured in, besides one of every kind that the schedule has."""


def frames_of(pipe: Any, frames: int, factor: float) -> int:
    """Frames of a clip of ``factor`` times the latent frames of one of ``frames``."""
    ratio = pipe.vae_scale_factor_temporal
    return ratio * (round(((frames - 1) // ratio + 1) * factor) - 1) + 1


def flops_of(pipe: Any, call: Mapping[str, Any], frames: int) -> float:
    """FLOP of a full transformer call at a length; text, which weighs little, left out."""
    family = family_of(pipe)
    geometry = family.geometry(pipe, call["height"], call["width"], frames)
    transformer = unwrap_module(next(iter(denoisers(pipe, family).values())))
    return family.flops(transformer, geometry, 1, 0)


def fitted(
    pipe: Any, prompts: Sequence[str], wanted: float, call: Mapping[str, Any], path: Path, tell: Callable[[str], None]
) -> list[int] | None:
    """The schedule of a length, from ``path`` if it is there; None where none is fast enough.

    Raises:
        SystemExit: the file holds the fit of something else.
    """
    asked = json.loads(json.dumps({"prompts": prompts, "speedup": wanted, "call": call}))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["asked"] != asked:
            raise SystemExit(f"{path} holds a fit of other prompts, speed-ups or calls: choose another --output.")
        schedule: list[int] | None = known["schedule"]
        return schedule
    try:
        schedule = list(fit_schedule(pipe, prompts, wanted, keep=False, progress=tell, **call).schedule)
    except OutOfReachError as error:
        tell(str(error))
        schedule = None
    path.write_text(json.dumps({"asked": asked, "schedule": schedule}) + "\n", encoding="utf-8")
    return schedule


def peak_bytes(pipe: Any, settings: Mapping[str, Any] | None, prompt: str, call: Mapping[str, Any]) -> int:
    """Most bytes that live at once in a call, decoding included; the weights come on top."""
    steps = call["num_inference_steps"] if settings is None else len(settings["schedule"])
    with LiveMemory() as memory:
        generate(pipe, settings, 0, **{**call, "prompt": prompt, "num_inference_steps": steps})
    return memory.peak


def line_of(
    pipe: Any, model: str, frames: int, wanted: float, prompts: tuple[Sequence[str], Sequence[str]],
    call: dict[str, Any], folder: Path, metrics: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Fits, runs and measures one length."""
    steps = call["num_inference_steps"]
    methods = [Method(f"base@{steps}", "base", steps, steps)]
    schedule = None
    folder.mkdir(parents=True, exist_ok=True)
    if wanted > 1:
        schedule = fitted(pipe, prompts[1], wanted, call, folder / FITS, print)
        if steps / wanted >= 2:
            # not speedup=, which would find what a user of this machine has fitted before
            settings = {"target": {"speedup": wanted}}
            methods.append(Method(f"{RULE}@{steps}", "DDiT, rule", steps, steps, settings))
    if schedule is not None:
        methods.append(Method(f"{FITTED}@{steps}", "DDiT, fitted", steps, steps, {"schedule": schedule}))
    of_call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    plan = Plan(model, methods, list(prompts[0]), [0], of_call, metrics, converged=False)
    run_sweep(pipe, plan, folder, pictures=False)
    summaries = {summary.method: summary for summary in summarise(plan, read_rows(folder))}
    found: dict[str, Any] = {"frames": frames, "wanted": round(wanted, 3), "schedule": schedule, "methods": {}}
    for name, method in ((PLAIN, f"base@{steps}"), (RULE, f"{RULE}@{steps}"), (FITTED, f"{FITTED}@{steps}")):
        if method in summaries:
            found["methods"][name] = _measured(summaries[method], metrics)
    kinds = sorted({*(schedule or [1])} - {1})
    brief = [1, 1, *kinds, *[1] * BRIEF][: BRIEF + len(kinds)]
    brief_call = {**call, "num_inference_steps": len(brief)}
    found["bytes"] = {PLAIN: peak_bytes(pipe, None, prompts[0][0], brief_call)}
    if kinds:
        found["bytes"][FITTED] = peak_bytes(pipe, {"schedule": brief}, prompts[0][0], brief_call)
    return found


def _measured(summary: Summary, metrics: Sequence[str]) -> dict[str, Any]:
    values = {name: summary.metrics[name] for name in metrics if name in summary.metrics}
    worst = {"worst": summary.worst["psnr"]} if "psnr" in summary.worst else {}
    return {"seconds": summary.seconds, "flops_speedup": summary.flops_speedup, **worst, **values}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of(__doc__, "'demo-video', or a folder with a demo.json", count=8, apart=2)
    parser.add_argument("--factors", default="1,2,3,4", help="times the latent frames of the model's own clip")
    options = parser.parse_args(arguments)
    chosen = prompts_of(options)
    call = {**call_defaults(options.model), "num_inference_steps": options.steps}
    pipe = load_any(options.model)
    metrics = metrics_for(pipe)
    own = call["num_frames"]
    lines = []
    for factor in read_numbers(options.factors, "factors"):
        frames = frames_of(pipe, own, factor)
        wanted = flops_of(pipe, call, frames) / flops_of(pipe, call, own)
        print(f"{frames} frames: {wanted:.2f}x wanted")
        longer = {**call, "num_frames": frames}
        folder = options.output / f"frames-{frames}"
        lines.append(line_of(pipe, options.model, frames, wanted, chosen, longer, folder, metrics))
    result = {
        "model": options.model,
        "steps": options.steps,
        "prompts": options.count,
        "frames": own,
        "call": call,
        "lines": lines,
    }
    write(result, options, RESULT)
    print(longer_table(result))


if __name__ == "__main__":
    try:
        main()
    except DDiTError as error:
        raise SystemExit(str(error)) from None
