"""``ddit-rt eval`` and ``ddit-rt analyse``, for the command line to mount."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError

console = Console()
analyse = typer.Typer(help="The paper's analyses on any pipeline: tables, figures, JSON.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="'demo', a folder in diffusers format, or a hub id.")]
Prompts = Annotated[
    str, typer.Option(help="'demo', 'drawbench', 'partiprompts', 'coco', a hub id, or a .txt, .csv, .tsv, .json(l).")
]
Count = Annotated[int, typer.Option("--count", help="How many of the prompts.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Size = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Coarse = Annotated[str, typer.Option(help="What a coarse step computes; see DDiTConfig.")]
Tau = Annotated[float | None, typer.Option(help="τ; None finds the one for --speedup.")]
Speedup = Annotated[float, typer.Option(help="FLOP ratio to calibrate τ for.")]
Folder = Annotated[Path, typer.Option(help="Folder for tables and figures.")]
Output = Annotated[Path, typer.Option(help="Folder for rows, results, curves and gallery; continued if begun.")]


def add_commands(app: typer.Typer) -> None:
    """Adds ``eval`` and ``analyse`` to the command line."""
    app.command("eval")(evaluate)
    app.add_typer(analyse, name="analyse")


def evaluate(
    model: Model,
    output: Output = Path("eval-out"),
    prompts: Prompts = "demo",
    count: Count = 64,
    seeds: Annotated[int, typer.Option(help="Seeds per prompt.")] = 1,
    steps: Annotated[str, typer.Option(help="Plain step counts; the first gets every method, others a few.")] = "50,28",
    methods: Annotated[Path | None, typer.Option(help="JSON list of methods instead of the standard ones.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Also run this trained adapter.")] = None,
    metrics: Annotated[str, typer.Option(help="Of psnr, ssim, lpips, fid, clip, imagereward; or 'all'.")] = "psnr,ssim",
    height: Size = None,
    width: Size = None,
    frames: Frames = None,
    shard: Annotated[str, typer.Option(help="'i/n': every n-th prompt from the i-th; they share the folder.")] = "0/1",
    plan_only: Annotated[bool, typer.Option("--plan", help="Only calibrate and write the plan, for shards.")] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, only write results.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measures speed and quality of every method against the plain pipeline, in one run on one machine."""
    from ..loading import load_any
    from .metrics import PAIRED
    from .standard import standard_plan
    from .sweep import PLAN, Plan, read_rows, run_sweep

    paired, judges = _metrics(metrics)
    index, number = _shard(shard)
    if report_only:
        _write(Plan.read(output), output, read_rows(output), judges)
        return
    pipe = load_any(model, dtype, device)
    if (output / PLAN).is_file():
        plan = Plan.read(output)
        if plan.model != model:
            raise ConfigError(f"{output} holds an evaluation of {plan.model}: choose another --output.")
        console.print(f"continuing {output}: the plan in it is kept, options that would change it are not looked at")
    else:
        from .prompts import load_prompts

        given = {"height": height, "width": width, "num_frames": frames}
        call = {name: value for name, value in given.items() if value is not None}
        usable = _usable(paired, PAIRED)
        with console.status("calibrating") as status:
            plan = standard_plan(
                pipe, model, load_prompts(prompts, count), _integers(steps, "steps"), list(range(seeds)), call, usable,
                methods_file=methods, adapter=adapter, progress=status.update,
            )  # fmt: skip
        plan.write(output)
    if plan_only:
        console.print(f"{output / PLAN}: {len(plan.methods)} methods, {len(plan.prompts)} prompts")
        return
    rows = run_sweep(pipe, plan, output, shard=(index, number))
    expected = len(plan.methods) * len(plan.prompts) * len(plan.seeds)
    if sum("seconds" in row for row in rows) < expected:
        console.print("other shards are not done yet; --report writes the results once they are")
        return
    _write(plan, output, rows, judges)


def _write(plan: Any, folder: Path, rows: Sequence[Any], judges: Sequence[str]) -> None:
    from .curves import plot_curves
    from .gallery import write_gallery
    from .judges import JUDGES
    from .summary import judge_pictures, summarise, table, write_results
    from .sweep import PLAN

    summaries = summarise(plan, rows)
    loaded = {name: judge for name in judges if (judge := _load(name, JUDGES[name])) is not None}
    judge_pictures(plan, folder, summaries, loaded)
    as_json, as_csv = write_results(plan, folder, summaries)
    curves = plot_curves(summaries, folder)
    machine = json.loads((folder / PLAN).read_text(encoding="utf-8"))["machine"]
    page = write_gallery(plan, folder, summaries, curves, machine)
    for reference in sorted({summary.reference for summary in summaries}, reverse=True):
        console.print(table([s for s in summaries if s.reference == reference], f"against {reference} plain steps"))
    console.print(f"{as_json}, {as_csv}, {page}, " + ", ".join(path.name for path in curves), highlight=False)


@analyse.command("order")
def analyse_order(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 8, steps: Steps = 50,
    speedup: Speedup = 2.0, coarse: Coarse = "auto", height: Size = None, width: Size = None, frames: Frames = None,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Table 3: orders 1 to 3 of the finite difference, at equal FLOP."""
    analysis = _analysis(model, prompts, count, steps, coarse, None, height, width, frames, seed, device, dtype)
    _lines("order", output, lambda: analysis.order(speedup), analysis)


@analyse.command("tau")
def analyse_tau(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 8, steps: Steps = 50,
    values: Annotated[str | None, typer.Option(help="τ with commas; None spreads them around --speedup's.")] = None,
    speedup: Speedup = 2.0, coarse: Coarse = "auto", height: Size = None, width: Size = None, frames: Frames = None,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Table 4: quality and speed over τ."""
    tau = None if values is not None else speedup
    analysis = _analysis(model, prompts, count, steps, coarse, tau, height, width, frames, seed, device, dtype)
    if values is not None:
        thresholds = _numbers(values, "values")
    else:
        middle = analysis.settings["threshold"]
        thresholds = [middle * factor for factor in (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)]
    _lines("tau", output, lambda: analysis.tau(thresholds), analysis)


@analyse.command("rho")
def analyse_rho(
    model: Model, output: Folder = Path("analysis"), prompts: Prompts = "demo", count: Count = 8, steps: Steps = 50,
    values: Annotated[str, typer.Option(help="ρ with commas.")] = "0.1,0.2,0.4,0.6,0.8,1.0", tau: Tau = None,
    speedup: Speedup = 2.0, coarse: Coarse = "auto", height: Size = None, width: Size = None, frames: Frames = None,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Quality and speed over ρ, at one τ."""
    wanted = tau if tau is not None else speedup
    analysis = _analysis(
        model, prompts, count, steps, coarse, wanted, height, width, frames, seed, device, dtype, tau is not None
    )
    _lines("rho", output, lambda: analysis.rho(_numbers(values, "values")), analysis)


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
    from .analyses import plot_sigma, write_schedules

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
    steps: Steps = 50, tau: Tau = None, speedup: Speedup = 2.0, coarse: Coarse = "auto", height: Size = None,
    width: Size = None, frames: Frames = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Figure 10: the schedules that DDiT chooses for several prompts."""
    from .analyses import write_schedules

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
    from ..loading import call_defaults, load_any
    from .analyses import Analysis
    from .calibrate import calibrate
    from .prompts import load_prompts

    chosen = load_prompts(prompts, count) if isinstance(prompts, str) else list(prompts)
    given = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
    call = {**call_defaults(model), **{name: value for name, value in given.items() if value is not None}}
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
    from .analyses import write_lines

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
    from ..loading import DEMO

    if model != DEMO:
        raise ConfigError("no --prompt: give two, a plain and a detailed one.")
    from ..demo.pipeline import DEMO_PROMPTS

    return [DEMO_PROMPTS["plain"], DEMO_PROMPTS["detailed"]]


def _metrics(text: str) -> tuple[list[str], list[str]]:
    from .judges import JUDGES
    from .metrics import PAIRED

    names = [*PAIRED, *JUDGES] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PAIRED and name not in JUDGES]
    if unknown:
        raise ConfigError(f"metrics={','.join(unknown)}: take from {', '.join([*PAIRED, *JUDGES])}, or 'all'.")
    return [name for name in names if name in PAIRED], [name for name in names if name in JUDGES]


def _usable(names: Sequence[str], loaders: dict[str, Callable[[], Any]]) -> list[str]:
    return [name for name in names if _load(name, loaders[name]) is not None]


def _load(name: str, loader: Callable[[], Any]) -> Any:
    from .metrics import MetricUnavailableError

    try:
        return loader()
    except MetricUnavailableError as error:
        console.print(f"left out {name}: {error}", style="yellow", markup=False, highlight=False)
        return None


def _shard(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise ConfigError(f"shard={text!r}: write i/n with i < n, as in 0/2.")
    return int(parts[0]), int(parts[1])


def _integers(text: str, name: str) -> list[int]:
    numbers = _numbers(text, name)
    if not numbers or any(number != int(number) or number < 1 for number in numbers):
        raise ConfigError(f"{name}={text!r}: whole numbers from 1 on, with commas.")
    return [int(number) for number in numbers]


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}={text!r}: write numbers with commas.") from None
