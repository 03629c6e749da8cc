"""The command line, ``ddit-rt``: one module per command, whose heavy imports wait until it runs."""

from __future__ import annotations

import typer

from ..errors import DDiTError
from . import analyse, bench, calibrate, demo, distill, evaluate, fit, generate, inspect, serve
from .quiet import quieten
from .terminal import print_error, warnings_above_bars

__all__ = ["app", "main"]

app = typer.Typer(
    name="ddit-rt",
    help="Diffusion transformers that choose their patch size anew at every denoising step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)
app.command("fit")(fit.command)
app.command("calibrate")(calibrate.command)
app.command("eval")(evaluate.command)
app.command("serve")(serve.command)
app.add_typer(analyse.group, name="analyse")
app.add_typer(distill.group, name="distill")
app.add_typer(bench.group, name="bench")


def main() -> None:
    """Entry point of ``ddit-rt``.

    Bad values and files that cannot be read or written are one line on stderr and exit status 2; Ctrl-C is one line
    and exit status 130. Any other exception is a fault of this project and keeps its traceback.
    """
    quieten()
    try:
        with warnings_above_bars():
            app()
    except (DDiTError, OSError) as error:
        print_error(error)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of a KeyboardInterrupt, without a word
            typer.echo("interrupted", err=True)
        raise
