"""What a command writes: results to stdout; notes, errors and one bar at a time (tqdm's) to stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import typer
from rich.console import Console

console = Console()
"""Tables, to stdout."""


def print_line(text: str) -> None:
    """A line of the result, however long."""
    typer.echo(text)


def print_json(value: Any) -> None:
    """The result for machines."""
    typer.echo(json.dumps(value, indent=2))


def note(text: str) -> None:
    """A line beside the result, above a bar that may be there."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def print_error(error: BaseException | str) -> None:
    """One line, whatever line breaks the text has."""
    typer.echo(f"{typer.style('error:', fg='red')} {' '.join(str(error).split())}", err=True)


@contextmanager
def activity(text: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on in one line that goes away at the end; no line where stderr is no terminal.

    Yields:
        Replaces the line's text.
    """
    from tqdm import tqdm

    # disable=None: of tqdm, off where the file is no terminal
    with tqdm(bar_format="{desc}", leave=False, disable=None) as line:

        def show(text: str) -> None:
            line.set_description_str(text[: shutil.get_terminal_size().columns - 1])

        show(text)
        yield show


def importing() -> AbstractContextManager[Any]:
    """The activity that every command begins with; it takes seconds."""
    return activity("importing torch and diffusers")


@contextmanager
def warnings_above_bars() -> Iterator[None]:
    """Writes the warnings that ddit_rt logs above a bar instead of through it."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm([logging.getLogger("ddit_rt")]):
        yield
