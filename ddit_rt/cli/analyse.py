"""``ddit-rt analyse``, for the command line to mount."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from .options import (
    Coarse,
    Count,
    Device,
    Dtype,
    Folder,
    Frames,
    Model,
    Prompts,
    Seed,
    Size,
    Speedup,
    Steps,
    Tau,
    read_numbers,
)

console = Console()
analyse = typer.Typer(help="The paper's analyses on any pipeline: tables, figures, JSON.", no_args_is_help=True)


@analyse.command("order")
def analyse_order(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 8, steps: Steps = 50,
    speedup: Speedup = 1.5, coarse: Coarse = "auto", height: Size = None, width: Size = None, frames: Frames = None,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Table 3: orders 1 to 3 of the finite difference, at equal FLOP."""
    analysis = _analysis(model, prompts, count, steps, coarse, None, height, width, frames, seed, device, dtype)
    _lines("order", output, lambda: analysis.order(speedup), analysis)


@analyse.command("tau")
def analyse_tau(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 8, steps: Steps = 50,
    values: Annotated[str | None, typer.Option(help="τ with commas; None spreads them around --speedup's.")] = None,
    speedup: Speedup = 1.5, coarse: Coarse = "auto", height: Size = None, width: Size = None, frames: Frames = None,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Table 4: quality and speed over τ."""
    tau = None if values is not None else speedup
    analysis = _analysis(model, prompts, count, steps, coarse, tau, height, width, frames, seed, device, dtype)
    if values is not None:
        thresholds = read_numbers(values, "values")
    else:
        middle = analysis.settings["threshold"]
        thresholds = [middle * factor for factor in (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)]
    _lines("tau", output, lambda: analysis.tau(thresholds), analysis)


@analyse.command("rho")
def analyse_rho(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 8, steps: Steps = 50,
    values: Annotated[str, typer.Option(help="ρ with commas.")] = "0.1,0.2,0.4,0.6,0.8,1.0", tau: Tau = None,
    speedup: Speedup = 1.5, coarse: Coarse = "auto", height: Size = None, width: Size = None, frames: Frames = None,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Quality and speed over ρ, at one τ."""
    wanted = tau if tau is not None else speedup
    analysis = _analysis(
        model, prompts, count, steps, coarse, wanted, height, width, frames, seed, device, dtype, tau is not None
    )
    _lines("rho", output, lambda: analysis.rho(read_numbers(values, "values")), analysis)


@analyse.command("patch-size")
def analyse_patch_size(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 4, steps: Steps = 50,
    height: Size = None, width: Size = None, frames: Frames = None, seed: Seed = 0, device: Device = None,
    dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 4: speed against patch size, every step at one size."""
    analysis = _analysis(model, prompts, count, steps, "auto", None, height, width, frames, seed, device, dtype)
    _lines("patch-size", output, analysis.patch_size, analysis)


@analyse.command("sigma")
def analyse_sigma(
    model: Model, output: Folder = Path("analysis"),
    prompt: Annotated[list[str] | None, typer.Option(help="Given twice: a plain and a detailed one.")] = None,
    steps: Steps = 50, height: Size = None, width: Size = None, frames: Frames = None, seed: Seed = 0,
    device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 6: σ of every patch size over the steps, for two prompts."""
    from ..evaluate import plot_sigma, write_schedules

    chosen = prompt or _two_prompts(model)
    analysis = _analysis(model, chosen, len(chosen), steps, "auto", None, height, width, frames, seed, device, dtype)
    reports = _watched(analysis, lambda: analysis.reports({"threshold": 0.0}))
    paths = write_schedules(reports, output, "sigma")
    plot_sigma(reports, output / "sigma.png")
    console.print(*paths)


@analyse.command("schedules")
def analyse_schedules(
    model: Model, output: Folder = Path("analysis"),
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    steps: Steps = 50, tau: Tau = None, speedup: Speedup = 1.5, coarse: Coarse = "auto", height: Size = None,
    width: Size = None, frames: Frames = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 10: the schedules that DDiT chooses for several prompts."""
    from ..evaluate import write_schedules

    chosen = prompt or _two_prompts(model)
    wanted = tau if tau is not None else speedup
    analysis = _analysis(
        model, chosen, len(chosen), steps, coarse, wanted, height, width, frames, seed, device, dtype, tau is not None
    )
    console.print(*write_schedules(_watched(analysis, lambda: analysis.reports({})), output, "schedules"))


def _analysis(
    model: str, prompts: str | Sequence[str], count: int, steps: int, coarse: str, tau: float | None,
    height: int | None, width: int | None, frames: int | None, seed: int, device: str | None, dtype: str | None,
    tau_is_given: bool = False,
) -> Any:  # fmt: skip
    """The pipeline with prompts and settings; ``tau`` is τ itself if given, else the FLOP ratio to find it for."""
    from ..evaluate import Analysis, load_prompts
    from ..fitting import calibrate
    from ..pipeline import call_arguments, load_any

    chosen = load_prompts(prompts, count) if isinstance(prompts, str) else list(prompts)
    call = call_arguments(model, height, width, frames, steps)
    pipe = load_any(model, dtype, device)
    settings: dict[str, Any] = {"coarse": coarse}
    if tau is not None and tau_is_given:
        settings["threshold"] = tau
    elif tau is not None:
        with console.status("calibrating") as status:
            found = calibrate(pipe, chosen[:2], tau, settings, 5, seed, status.update, **call)
        settings["threshold"] = found.threshold
    return Analysis(pipe, chosen, call, settings, seed)


def _watched(analysis: Any, work: Callable[[], Any]) -> Any:
    with console.status("running") as status:
        analysis.progress = status.update
        return work()


def _lines(name: str, folder: Path, work: Callable[[], Any], analysis: Any) -> None:
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
    console.print(*paths)


def _two_prompts(model: str) -> list[str]:
    from ..pipeline import DEMO

    if model != DEMO:
        raise ConfigError("no --prompt: give two, a plain and a detailed one.")
    from ..demo import DEMO_PROMPTS

    return [DEMO_PROMPTS["plain"], DEMO_PROMPTS["detailed"]]
