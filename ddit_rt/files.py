"""What is written so that it lasts."""

from __future__ import annotations

import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Makes sure that a file, or the entries of a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
