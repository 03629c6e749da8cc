"""``ddit-rt analyse``: order, tau, rho, patch-size, misses, coarse, sigma, schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .models import load, load_prompts, shipped_prompts
from .options import (
    Coarse,
    Count,
    Device,
    Dtype,
    Frames,
    Height,
    Model,
    PromptList,
    PromptSource,
    Seed,
    Steps,
    TableFolder,
    TargetSpeedup,
    Tau,
    Width,
    read_integers,
    read_numbers,
)
from .terminal import activity, console, importing, print_line

group = typer.Typer(help="The paper's analyses on any pipeline: tables, figures, JSON.", no_args_is_help=True)


@group.command("order")
def order(
    model: Model, output: TableFolder = Path("analysis"), prompts: PromptSource = None, count: Count = 8,
    steps: Steps = 50, speedup: TargetSpeedup = 1.5, coarse: Coarse = "auto", height: Height = None,
    width: Width = None, frames: Frames = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Table 3: orders 1 to 3 of the finite difference, at equal FLOP."""
    call = _call(model, height, width, frames, steps)

    from ..schedule import check_speedup

    check_speedup(speedup)
    analysis = _open(model, load_prompts(prompts, count, model), call, coarse, seed, device, dtype)
    _write_table("order", output, lambda: analysis.order(speedup), analysis)


@group.command("tau")
def tau(
    model: Model, output: TableFolder = Path("analysis"), prompts: PromptSource = None, count: Count = 8,
    steps: Steps = 50,
    values: Annotated[str | None, typer.Option(help="τ with commas; by default around the one of --speedup.")] = None,
    speedup: TargetSpeedup = 1.5, coarse: Coarse = "auto", height: Height = None, width: Width = None,
    frames: Frames = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Table 4: quality and speed over τ."""
    thresholds = None if values is None else read_numbers(values, "values")
    call = _call(model, height, width, frames, steps)
    wanted = speedup if thresholds is None else None
    analysis = _open(model, load_prompts(prompts, count, model), call, coarse, seed, device, dtype, wanted)
    if thresholds is None:
        middle = analysis.settings["threshold"]
        thresholds = [middle * factor for factor in (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)]
    _write_table("tau", output, lambda: analysis.tau(thresholds), analysis)


@group.command("rho")
def rho(
    model: Model, output: TableFolder = Path("analysis"), prompts: PromptSource = None, count: Count = 8,
    steps: Steps = 50, values: Annotated[str, typer.Option(help="ρ with commas.")] = "0.1,0.2,0.4,0.6,0.8,1.0",
    tau: Tau = None, speedup: TargetSpeedup = 1.5, coarse: Coarse = "auto", height: Height = None,
    width: Width = None, frames: Frames = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Quality and speed over ρ, at one τ."""
    quantiles = read_numbers(values, "values")
    call = _call(model, height, width, frames, steps)
    analysis = _open(model, load_prompts(prompts, count, model), call, coarse, seed, device, dtype, speedup, tau)
    _write_table("rho", output, lambda: analysis.rho(quantiles), analysis)


@group.command("patch-size")
def patch_size(
    model: Model, output: TableFolder = Path("analysis"), prompts: PromptSource = None, count: Count = 4,
    steps: Steps = 50, height: Height = None, width: Width = None, frames: Frames = None, seed: Seed = 0,
    device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 4: speed against patch size, every step at one size."""
    call = _call(model, height, width, frames, steps)
    analysis = _open(model, load_prompts(prompts, count, model), call, "auto", seed, device, dtype)
    _write_table("patch-size", output, analysis.patch_size, analysis)


@group.command("misses")
def misses(
    model: Model, output: TableFolder = Path("analysis"), prompts: PromptSource = None, count: Count = 24,
    steps: Steps = 50, values: Annotated[str, typer.Option(help="Speed-ups with commas.")] = "2,2.5,3,4",
    height: Height = None, width: Width = None, frames: Frames = None, seed: Seed = 0, device: Device = None,
    dtype: Dtype = None,
) -> None:  # fmt: skip
    """Whether what forecasts missed in a run says how far it ends from the plain output."""
    speedups = read_numbers(values, "values")
    call = _call(model, height, width, frames, steps)

    from ..evaluate import write_misses
    from ..schedule import check_speedup

    for speedup in speedups:
        check_speedup(speedup)
    analysis = _open(model, load_prompts(prompts, count, model), call, "auto", seed, device, dtype)
    found = _watched(analysis, lambda: analysis.misses(speedups))
    shown = Table("speed-up", "PSNR, dB", "largest miss ÷ least", "rank correlation", "p")
    for line in found:
        shown.add_row(
            f"{line.speedup:g}x",
            f"{line.psnr:.1f} ({line.psnr_low:.1f} to {line.psnr_high:.1f})",
            f"{line.spread:.2f}",
            f"{line.correlation:+.2f}",
            f"{line.p:.2g}",
        )
    console.print(shown)
    print_line(str(write_misses(found, output)))


@group.command("coarse")
def coarse(
    model: Model, output: TableFolder = Path("analysis"), prompts: PromptSource = None, count: Count = 8,
    steps: Steps = 50, multiples: Annotated[str, typer.Option(help="Of the patch size, with commas.")] = "2,4",
    values: Annotated[str, typer.Option(help="Steps since the last full one, with commas.")] = "1,2,3,5",
    height: Height = None, width: Width = None, frames: Frames = None, seed: Seed = 0, device: Device = None,
    dtype: Dtype = None,
) -> None:  # fmt: skip
    """How much of what a full step says coarse runs tell that the steps before it do not."""
    call = _call(model, height, width, frames, steps)
    sizes, distances = read_integers(multiples, "multiples", least=2), read_integers(values, "values")

    from ..config import DDiTConfig

    DDiTConfig(multiples=(1, *sizes))  # unknown ones are refused before a large model is loaded

    from ..evaluate import coarse_news, write_news

    pipe = load(model, dtype, device, call)
    with activity("running") as show:
        found = coarse_news(pipe, load_prompts(prompts, count, model), sizes, distances, call, seed, show)
    shown = Table("size", "steps since full", "last", "line", "best of earlier", "with coarse", "delta", "news")
    for one in found:
        missed = (one.unchanged, 1.0, one.earlier, one.with_coarse, one.delta)
        shown.add_row(f"{one.multiple}p", f"{one.distance}", *(f"{value:.2f}" for value in missed), f"{one.news:.0%}")
    console.print(shown)
    print_line(str(write_news(found, output)))


@group.command("sigma")
def sigma(
    model: Model, output: TableFolder = Path("analysis"), prompt: PromptList = None, steps: Steps = 50,
    height: Height = None, width: Width = None, frames: Frames = None, seed: Seed = 0, device: Device = None,
    dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 6: σ of every patch size over the steps, for two prompts, a plain and a detailed one."""
    call = _call(model, height, width, frames, steps)

    from ..evaluate import plot_sigma, write_schedules

    analysis = _open(model, prompt or _two_prompts(model), call, "auto", seed, device, dtype)
    reports = _watched(analysis, lambda: analysis.reports({"threshold": 0.0}))
    paths = write_schedules(reports, output, "sigma")
    plot_sigma(reports, output / "sigma.png")
    print_line(" ".join(map(str, paths)))


@group.command("schedules")
def schedules(
    model: Model, output: TableFolder = Path("analysis"), prompt: PromptList = None, steps: Steps = 50,
    tau: Tau = None, speedup: TargetSpeedup = 1.5, coarse: Coarse = "auto", height: Height = None,
    width: Width = None, frames: Frames = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 10: the schedules that DDiT chooses for several prompts."""
    call = _call(model, height, width, frames, steps)

    from ..evaluate import write_schedules

    analysis = _open(model, prompt or _two_prompts(model), call, coarse, seed, device, dtype, speedup, tau)
    paths = write_schedules(_watched(analysis, lambda: analysis.reports({})), output, "schedules")
    print_line(" ".join(map(str, paths)))


def _open(
    model: str,
    prompts: Sequence[str],
    call: dict[str, Any],
    coarse: str,
    seed: int,
    device: str | None,
    dtype: str | None,
    speedup: float | None = None,
    tau: float | None = None,
) -> Any:
    """The analysis of a pipeline at ``tau``, or else at the τ that ``speedup`` needs; with neither, at none yet."""
    from ..config import DDiTConfig

    settings: dict[str, Any] = {"coarse": coarse} if tau is None else {"coarse": coarse, "threshold": tau}
    DDiTConfig(**settings)  # bad settings are refused before a large model is loaded

    from ..evaluate import Analysis
    from ..fitting import calibrate
    from ..schedule import check_speedup

    if speedup is not None:
        check_speedup(speedup)
    pipe = load(model, dtype, device, call)
    if tau is None and speedup is not None:
        with activity("calibrating") as show:
            found = calibrate(pipe, prompts[:2], speedup, settings, 5, seed, show, **call)
        settings["threshold"] = found.threshold
    return Analysis(pipe, prompts, call, settings, seed)


def _call(model: str, height: int | None, width: int | None, frames: int | None, steps: int) -> dict[str, Any]:
    with importing():
        from ..pipeline import call_arguments

    return call_arguments(model, height, width, frames, steps)


def _two_prompts(model: str) -> list[str]:
    examples = shipped_prompts(model, "no --prompt: give two, a plain and a detailed one.")
    return list(examples.values())[:2]


def _watched(analysis: Any, work: Callable[[], Any]) -> Any:
    with activity("running") as show:
        analysis.progress = show
        return work()


def _write_table(name: str, folder: Path, work: Callable[[], Any], analysis: Any) -> None:
    """Runs an analysis, writes its lines and prints them."""
    from ..evaluate import write_lines

    lines = _watched(analysis, work)
    paths = write_lines(lines, folder, name)
    shown = Table(name, "τ", "s", "speed-up", "FLOP ÷", "tokens per step", "PSNR, dB", "SSIM")
    for line in lines:
        shown.add_row(
            line.label,
            "" if line.threshold is None else f"{line.threshold:.2e}",
            f"{line.seconds:.3f}",
            f"{line.speedup:.2f}",
            f"{line.flops_speedup:.2f}",
            f"{line.tokens:.0f}",
            f"{line.psnr:.1f}",
            f"{line.ssim:.3f}",
        )
    console.print(shown)
    print_line(" ".join(map(str, paths)))
