"""``ddit-rt bench``: serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import ConfigError
from .options import Seed, StepsOfModel, folder_option, read_integers, read_numbers
from .terminal import activity, console, note, print_error, print_line

if TYPE_CHECKING:
    from ..serve import Percentiles, Summary

_LATE = 0.1  # seconds; behind its time by more, a load is not the one asked for

group = typer.Typer(help="Measures a running server.", no_args_is_help=True)


@group.command("serve")
def serve(
    url: Annotated[str, typer.Argument(help="Of the server, such as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="A name that the server lists; by default its first.")] = None,
    requests: Annotated[int, typer.Option(help="Requests per level of load and speed-up.")] = 200,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: clients at once, with commas for several levels; 16 by default.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests per second, with commas; they arrive at random.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes to mix, such as 128x128,96x96; by default the model's.")
    ] = None,
    steps: StepsOfModel = None,
    speedups: Annotated[str, typer.Option(help="Speed-ups to compare, with commas; 1 is plain.")] = "1,3",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line; by default those that the server lists.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Ask for partial images, and time the first.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns that the speed-ups take at each level.")] = 4,
    warmup: Annotated[int, typer.Option(help="Requests of each speed-up before all others, not counted.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request counts as lost.")] = 300.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="For servers that ask for one.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[Path, folder_option("Folder for the numbers and the plot.")] = Path("bench-out"),
) -> None:
    """Drives a server and draws latency against throughput, plain against accelerated.

    Every request has to end in a picture or in an error object; exit status 1 says that some did neither.
    """
    if concurrency is not None and rate is not None:
        raise ConfigError(f"concurrency={concurrency!r} and rate={rate!r}: give one of them.")
    levels = read_numbers(rate, "rate") if rate is not None else read_integers(concurrency or "16", "concurrency")

    from ..serve import Load, run_load, summarize, write_load

    load = Load(
        mode="closed" if rate is None else "open",
        levels=tuple(float(level) for level in levels),
        requests=requests,
        rounds=rounds,
        warmup=warmup,
        speedups=tuple(read_numbers(speedups, "speedups")),
        model=model,
        sizes=() if sizes is None else tuple(sizes.split(",")),
        steps=steps,
        prompts=() if prompts is None else _read_prompts(prompts),
        stream=stream,
        seed=seed,
        timeout=timeout,
    )
    with activity("asking for models") as show:
        load, blocks = run_load(url, load, api_key, show)
    summaries = summarize(blocks)
    _print(load.mode, summaries)  # before anything is written: a full disk must not cost the numbers
    print_line(" ".join(map(str, write_load(url, load, summaries, output))))
    lost = sum(summary.lost for summary in summaries)
    if lost:
        print_error(f"{lost} requests ended neither in a picture nor in an error object")
        raise typer.Exit(1)


def _read_prompts(path: Path) -> tuple[str, ...]:
    from ..settings import read_text

    prompts = tuple(line.strip() for line in read_text(path, "prompts").splitlines() if line.strip())
    if not prompts:
        raise ConfigError(f"prompts={str(path)!r} holds no prompt: write one a line.")
    return prompts


def _print(mode: str, summaries: list[Summary]) -> None:
    load = "clients" if mode == "closed" else "per second"
    whole, inside = Table(box=SIMPLE_HEAD, pad_edge=False), Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in (load, "speed-up", "done", "pictures/s", "÷ plain", "p50", "p90", "p99"):
        whole.add_column(name)
    for name in (load, "speed-up", "first partial", "queued", "denoising", "batch"):
        inside.add_column(name)
    whole.title = "pictures per second (least to most of a round), latency in seconds"
    inside.title = "p50, p90 and p99 in seconds, mean batch"
    for one in summaries:
        at = (f"{one.level:g}", f"{one.speedup:g}x")
        rate, ratio = one.throughput, one.against_plain
        whole.add_row(
            *at,
            f"{one.completed}/{one.sent}",
            f"{rate.middle:.3g} ({rate.least:.3g}-{rate.most:.3g})",
            "" if ratio is None else f"{ratio.middle:.2f}",
            *_numbers(one.latency),
        )
        times = (one.first_partial, one.queued, one.denoising)
        inside.add_row(*at, *map(" ".join, map(_numbers, times)), "" if one.batch is None else f"{one.batch:.1f}")
    console.print(whole)
    console.print(inside)
    for one in summaries:
        for code, number in one.failed.items():
            print_line(f"{one.level:g} {load}, {one.speedup:g}x: {number} of {one.sent} failed, {code}")
    behind = max(one.behind for one in summaries)
    if behind > _LATE:
        note(f"requests were sent up to {behind:.2f} s after they were due: this machine is too busy to send them")


def _numbers(times: Percentiles | None) -> list[str]:
    return [] if times is None else [f"{value:.2f}" for value in (times.p50, times.p90, times.p99)]
