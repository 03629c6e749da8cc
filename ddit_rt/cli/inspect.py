"""``ddit-rt inspect``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import ConfigError
from ..multiples import label
from .options import Json, OptionalModel
from .terminal import activity, console, importing, print_json, print_line


def command(
    model: OptionalModel = None,
    height: Annotated[int, typer.Option(help="Height in pixels.", min=1)] = 1024,
    width: Annotated[int, typer.Option(help="Width in pixels.", min=1)] = 1024,
    frames: Annotated[int, typer.Option(help="Frames of a video; 1 for pictures.", min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the text condition.", min=0)] = 512,
    listing: Annotated[bool, typer.Option("--supported", help="List the supported models instead.")] = False,
    as_json: Json = False,
) -> None:
    """Says what accelerate would do to a pipeline: family, sizes, tokens and FLOP per size. Loads no weights."""
    with importing():
        from ..pipeline import inspect_pipeline, supported

    if listing:
        _list(supported(), as_json)
        return
    if model is None:
        raise ConfigError("no model given: 'demo', a folder or a hub id; or --supported to list what can be run.")
    with activity(f"reading {model}"):
        found = inspect_pipeline(model, height, width, frames, text_tokens)
    if as_json:
        print_json(asdict(found))
        return
    gigabytes = found.parameters * 2 / 1e9
    print_line(
        f"{found.pipeline} (family {found.family}): {found.transformer}, {found.parameters / 1e6:,.1f} M parameters "
        f"({gigabytes:,.2f} GB in bfloat16), {found.scheduler}\n"
        f"latent {' x '.join(map(str, found.latent))} (channels, frames, height, width), {text_tokens} text tokens"
    )
    table = Table("patch", "latent pixels", "grid", "tokens", "GFLOP per call", "share of p", "divides among ranks")
    for size in found.sizes:
        table.add_row(
            label(size.multiple),
            f"{size.side} x {size.side}",
            f"{size.grid[0]} x {size.grid[1]}",
            str(size.tokens),
            f"{size.flops / 1e9:,.1f}",
            f"{size.flops / found.sizes[0].flops:.3f}",
            ", ".join(map(str, size.ranks)) or "none",
        )
    console.print(table)
    print_line(f"attention='auto' on this machine, in bfloat16: {found.attention}")
    for name, reason in found.limits.items():
        print_line(f"without {name}: {reason}")


def _list(families: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(families)
        return
    for family in families:
        sizes = ", ".join(map(label, family["multiples"]))
        print_line(f"{family['family']}: {family['transformer']} at {sizes}")
        print_line(f"  {', '.join(family['pipelines'])}")
        for name, reason in family["limits"].items():
            print_line(f"  without {name}: {reason}")
