"""What is written so that it lasts."""

from __future__ import annotations

import os
import threading
from pathlib import Path


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
