"""``ddit-rt generate``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..files import check_output
from .batch import generate_all
from .models import load
from .options import (
    Adapter,
    Costs,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    OptionalCoarse,
    OptionalOrder,
    OptionalQuantile,
    OptionalSpeedup,
    OptionalThreshold,
    Quantize,
    Reference,
    Seed,
    StepsOfModel,
    TowardConverged,
    Width,
    read_schedule,
)
from .terminal import importing, print_json, print_line

if TYPE_CHECKING:
    from ..trajectories import Outcome

_PICTURES, _VIDEOS = (".png", ".jpg", ".jpeg", ".webp"), (".gif", ".mp4")


def command(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="In place of the prompt: a file with one a line, or a .jsonl with prompt and seed. torchrun divides "
            "them among processes, and so does accelerate launch; a second start makes what is missing."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Picture (.png, .jpg, .webp) or video (.gif, .mp4); with --prompts a folder.",
            show_default="out.png, or the folder out",
        ),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: StepsOfModel = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Turns on (true) classifier-free guidance.")] = None,
    speedup: OptionalSpeedup = None,
    reference: Reference = "plain",
    toward_converged: TowardConverged = 0.0,
    costs: Costs = "flops",
    threshold: OptionalThreshold = None,
    quantile: OptionalQuantile = None,
    order: OptionalOrder = None,
    schedule: Annotated[
        str | None, typer.Option(help="Multiples, one per step (1,1,1,2,4,...), or a file of `ddit-rt fit`.")
    ] = None,
    coarse: OptionalCoarse = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also run the plain pipeline, and compare.")] = False,
    as_json: Json = False,
) -> None:
    """Generates a picture or video with any supported pipeline, at twice the speed unless told otherwise.

    --speedup sets another target; --schedule, or an option of the threshold rule, takes its place.
    """
    from ..config import DDiTConfig

    given = {"speedup": speedup, "threshold": threshold, "quantile": quantile, "order": order, "coarse": coarse}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if reference != "plain":
        settings["reference"] = reference
    if toward_converged:
        settings["toward_converged"] = toward_converged
    if costs != "flops":
        settings["costs"] = costs
    if schedule is not None:
        settings["schedule"] = read_schedule(schedule)
    DDiTConfig(**settings)  # bad settings are refused before a large model is loaded
    if (prompt is None) == (prompts is None):
        raise ConfigError("give either a prompt or --prompts FILE.")
    if prompts is not None and baseline:
        raise ConfigError("--baseline is for one prompt: `ddit-rt eval` compares over many.")
    picture, folder = output or Path("out.png"), output or Path("out")
    if prompts is None:
        _check_picture(picture)
    else:
        check_output(folder, folder=True)

    with importing():
        from ..granularity import load_adapter
        from ..pipeline import call_arguments, check_scheme, frame_rate
        from ..trajectories import generate, psnr, save, ssim

    if quantize is not None:
        check_scheme(quantize)
    words = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": guidance}
    call = call_arguments(model, height, width, frames, steps, words)
    if prompts is not None:
        generate_all(model, prompts, folder, call, settings, adapter, quantize, seed, device, dtype, as_json)
        return
    if adapter is not None:
        settings["adapter"] = load_adapter(adapter)
    pipe = load(model, dtype, device, call, scheme=quantize)
    if picture.suffix.lower() == ".mp4" and "num_frames" not in signature(type(pipe).__call__).parameters:
        raise ConfigError(f"output={str(picture)!r}: {type(pipe).__name__} makes pictures; name a .png.")
    fast = _with_bar("accelerated", pipe, lambda: generate(pipe, settings, seed, **call))
    fps = frame_rate(model)
    written = save(fast.frames, picture, fps)
    assert fast.report is not None
    result: dict[str, Any] = {"output": str(written), "seconds": fast.seconds, "report": fast.report.to_dict()}
    if baseline:
        base = _with_bar("plain", pipe, lambda: generate(pipe, None, seed, **call))
        beside = save(base.frames, picture.with_stem(picture.stem + "-baseline"), fps)
        result["baseline"] = {
            "output": str(beside),
            "seconds": base.seconds,
            "speedup": base.seconds / fast.seconds,
            "psnr": psnr(fast.frames, base.frames),
            "ssim": ssim(fast.frames, base.frames),
        }
    if as_json:
        print_json(result)
        return
    print_line(str(fast.report))
    print_line(f"{written}: {fast.seconds:.2f} s")
    if baseline:
        b = result["baseline"]
        print_line(
            f"{b['output']}: {b['seconds']:.2f} s; accelerated {b['speedup']:.2f}x faster in wall-clock time, "
            f"{b['psnr']:.1f} dB PSNR, {b['ssim']:.3f} SSIM to it"
        )


def _check_picture(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in (*_PICTURES, *_VIDEOS):
        raise ConfigError(f"output={str(path)!r}: name a file that ends in {', '.join((*_PICTURES, *_VIDEOS))}.")
    if suffix == ".mp4" and not all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        raise ConfigError(
            f"output={str(path)!r}: .mp4 needs imageio with ffmpeg: pip install 'ddit-rt[eval]', or write a .gif."
        )
    check_output(path)


def _with_bar(text: str, pipe: Any, run: Callable[[], Outcome]) -> Outcome:
    """Runs with the pipeline's own bar over its denoising steps; none where stderr is no terminal."""
    pipe.set_progress_bar_config(desc=text, leave=False, disable=None)
    try:
        return run()
    finally:
        pipe.set_progress_bar_config(disable=True)
