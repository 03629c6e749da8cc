"""What is written so that it lasts."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from .errors import ConfigError


def check_output(path: Path, folder: bool = False) -> None:
    """Refuses an output that could not be written, before the work that it is for; makes nothing.

    Args:
        path: A file, or a folder of several; neither it nor the folders above it need be there.
        folder: Which of them.

    Raises:
        ConfigError: naming the output and what is in its way.
    """
    given = f"output={str(path)!r}"
    if not folder and path.is_dir():
        raise ConfigError(f"{given} is a folder, a file is wanted: name one in it.")
    if not folder and path.exists():
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{given} is there and cannot be written to: name another file.")
        return
    wanted = path if folder else path.parent
    there = next(place for place in (wanted, *wanted.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"{given}: {there} is a file, a folder is wanted.")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(f"{given}: {there} cannot be written into ({error.strerror}); choose another.") from None


def to_disk(path: Path) -> None:
    """Makes sure that a file, or the entries of a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_whole(path: Path, text: str, parts: Path | None = None) -> None:
    """Writes a text file that is whole or absent at every moment, whichever processes and threads write it at once.

    Args:
        path: The file.
        text: Its content, in UTF-8.
        parts: Folder of what is not whole yet, on the same file system; None is the file's own.
    """
    part = (parts or path.parent) / f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    part.write_text(text, encoding="utf-8")
    to_disk(part)
    os.replace(part, path)
