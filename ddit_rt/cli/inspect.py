"""``ddit-rt inspect``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from .options import Json, Model
from .terminal import activity, console, importing, print_json, print_line


def command(
    model: Model,
    height: Annotated[int, typer.Option(help="Height in pixels.", min=1)] = 1024,
    width: Annotated[int, typer.Option(help="Width in pixels.", min=1)] = 1024,
    frames: Annotated[int, typer.Option(help="Frames of a video; 1 for pictures.", min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the text condition.", min=0)] = 512,
    as_json: Json = False,
) -> None:
    """Says what accelerate would do to a pipeline: family, sizes, tokens and FLOP per size. Loads no weights."""
    with importing():
        from ..pipeline import inspect_pipeline

    with activity(f"reading {model}"):
        found = inspect_pipeline(model, height, width, frames, text_tokens)
    if as_json:
        print_json(asdict(found))
        return
    print_line(
        f"{found.pipeline} (family {found.family}): {found.transformer}, {found.parameters / 1e6:,.1f} M parameters, "
        f"{found.scheduler}\nlatent {' x '.join(map(str, found.latent))} (channels, frames, height, width), "
        f"{text_tokens} text tokens"
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
