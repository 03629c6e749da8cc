"""The command line: ddit-rt demo | generate | inspect | calibrate; eval, analyse, distill, fit from their rooms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, DDiTError
from .distill import add_commands as add_distillation
from .evaluate import add_commands as add_evaluation
from .fit import add_commands as add_fitting

app = typer.Typer(
    name="ddit-rt",
    help="Diffusion transformers that choose their patch size anew at every denoising step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[str, typer.Argument(help="'demo', a folder in diffusers format, or a hub id.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.")]
Coarse = Annotated[str, typer.Option(help="What a coarse step computes; see DDiTConfig.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, plots and the page.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    threshold: Annotated[float | None, typer.Option(help="τ; None takes the value calibrated for the demo.")] = None,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each side; the median counts.")] = 2,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Shows the method on the small model that ships with the package: no download, no GPU."""
    from ..demo import print_summary, run_showcase
    from ..pipeline import DEMO, load_any

    result = run_showcase(
        load_any(DEMO, "float32", device), output, steps=steps, threshold=threshold, seed=seed, repeats=repeats
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_summary(result, console)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option(help="Picture (.png, .jpg) or video (.gif, .mp4).")] = Path("out.png"),
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale of the pipeline.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Turns on (true) classifier-free guidance.")] = None,
    threshold: Annotated[float, typer.Option(help="τ: a size is smooth enough when its σ is below.")] = 1e-3,
    quantile: Annotated[float, typer.Option(help="ρ: share of patches that have to be smooth.")] = 0.4,
    order: Annotated[int, typer.Option(help="Order of the finite difference, 1 to 3.")] = 3,
    schedule: Annotated[
        str | None, typer.Option(help="Multiples, one per step (1,1,1,2,4,...), or a file of `ddit-rt fit`.")
    ] = None,
    coarse: Coarse = "auto",
    adapter: Annotated[str | None, typer.Option(help="Trained adapter.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also run the plain pipeline, and compare.")] = False,
    as_json: Json = False,
) -> None:
    """Generates a picture or video with any supported pipeline."""
    from ..config import DDiTConfig
    from ..pipeline import call_arguments, check_size, load_any
    from ..trajectories import generate as run
    from ..trajectories import psnr, save, ssim

    settings: dict[str, Any] = {"threshold": threshold, "quantile": quantile, "order": order, "coarse": coarse}
    if schedule is not None:
        settings["schedule"] = _multiples(schedule)
    DDiTConfig(**settings)  # refuse bad settings before a large model is loaded
    if adapter is not None:
        settings["adapter"] = adapter
    words = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": guidance}
    call = call_arguments(model, height, width, frames, steps, words)
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps}: at least one denoising step.")
    pipe = load_any(model, dtype, device)
    if "height" in call and "width" in call:
        check_size(pipe, call["height"], call["width"])
    fast = run(pipe, settings, seed, **call)
    written = save(fast.frames, output)
    assert fast.report is not None
    result: dict[str, Any] = {"output": str(written), "seconds": fast.seconds, "report": fast.report.to_dict()}
    if baseline:
        base = run(pipe, None, seed, **call)
        beside = save(base.frames, output.with_stem(output.stem + "-baseline"))
        result["baseline"] = {
            "output": str(beside),
            "seconds": base.seconds,
            "speedup": base.seconds / fast.seconds,
            "psnr": psnr(fast.frames, base.frames),
            "ssim": ssim(fast.frames, base.frames),
        }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    console.print(str(fast.report), highlight=False, markup=False)
    console.print(f"{written}: {fast.seconds:.2f} s")
    if baseline:
        b = result["baseline"]
        console.print(
            f"{b['output']}: {b['seconds']:.2f} s; accelerated {b['speedup']:.2f}x faster in wall-clock time, "
            f"{b['psnr']:.1f} dB PSNR, {b['ssim']:.3f} SSIM to it"
        )


@app.command()
def inspect(
    model: Model,
    height: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    width: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    frames: Annotated[int, typer.Option(help="Frames of a video; 1 for pictures.")] = 1,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the text condition.")] = 512,
    as_json: Json = False,
) -> None:
    """Says what accelerate would do to a pipeline: family, sizes, tokens and FLOP per size. Loads no weights."""
    from dataclasses import asdict

    from ..pipeline import inspect_pipeline

    found = inspect_pipeline(model, height, width, frames, text_tokens)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    console.print(
        f"{found.pipeline} (family {found.family}): {found.transformer}, {found.parameters / 1e6:,.1f} M parameters, "
        f"{found.scheduler}\nlatent {' x '.join(map(str, found.latent))} (channels, frames, height, width), "
        f"{text_tokens} text tokens",
        highlight=False,
    )
    table = Table("patch", "latent pixels", "grid", "tokens", "GFLOP per call", "share of p")
    for size in found.sizes:
        table.add_row(
            "p" if size.multiple == 1 else f"{size.multiple}p",
            f"{size.side} x {size.side}",
            f"{size.grid[0]} x {size.grid[1]}",
            str(size.tokens),
            f"{size.flops / 1e9:,.1f}",
            f"{size.flops / found.sizes[0].flops:.3f}",
        )
    console.print(table)


@app.command()
def calibrate(
    model: Model,
    speedup: Annotated[float, typer.Option(help="Wanted ratio of FLOP, full over accelerated.")] = 1.5,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    quantile: Annotated[float, typer.Option(help="ρ.")] = 0.4,
    order: Annotated[int, typer.Option(help="Order of the finite difference.")] = 3,
    coarse: Coarse = "auto",
    trials: Annotated[int, typer.Option(help="Values of τ to try.")] = 6,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Suggests the τ that gives a wanted speed-up, from a few runs."""
    from dataclasses import asdict

    from ..fitting import calibrate as search
    from ..pipeline import call_arguments, load_any

    call = call_arguments(model, height, width, frames, steps)
    prompts = prompt or _default_prompts(model)
    settings = {"quantile": quantile, "order": order, "coarse": coarse}
    pipe = load_any(model, dtype, device)
    with console.status("calibrating") as status:
        found = search(pipe, prompts, speedup, settings, trials, seed, status.update, **call)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    table = Table("τ", "FLOP speed-up", "PSNR to plain, dB")
    for trial in found.trials:
        table.add_row(f"{trial.threshold:.3e}", f"{trial.speedup:.2f}", f"{trial.psnr:.1f}")
    console.print(table)
    console.print(f"threshold={found.threshold:.3e} gives {found.speedup:.2f}x at {found.psnr:.1f} dB")


def _default_prompts(model: str) -> list[str]:
    from ..pipeline import DEMO

    if model != DEMO:
        raise ConfigError("no --prompt: give one or more that resemble your use, τ depends on them.")
    from ..demo import DEMO_PROMPTS

    return list(DEMO_PROMPTS.values())


def _multiples(text: str) -> list[int]:
    if text.endswith(".json"):
        from ..schedule import FittedSchedule

        return FittedSchedule.load(text).schedule
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"schedule={text!r}: write multiples with commas, as in 1,1,1,2,4, or name a .json of `ddit-rt fit`."
        ) from None


add_evaluation(app)
add_distillation(app)
add_fitting(app)


def main() -> None:
    """Entry point of ``ddit-rt``: an error of this project is one line and exit code 2, not a traceback."""
    try:
        app()
    except DDiTError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
