"""Pictures that are asked for by URL: files that are kept for some time."""

from __future__ import annotations

import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

from .video_files import TEMPORARY, write_whole

_ID = re.compile(r"img_[0-9a-f]{32}\.(png|webp|jpeg)")


class PictureStore:
    """A folder of pictures under names that nobody guesses.

    Args:
        folder: Made if it is not there.
        keep_seconds: How long they are kept.
    """

    def __init__(self, folder: Path, keep_seconds: float) -> None:
        self._folder, self._keep = folder, keep_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, data: bytes, format: str) -> str:
        """The name under which a picture is kept now.

        Raises:
            StorageError: there is no room.
        """
        name = f"img_{secrets.token_hex(16)}.{format}"
        write_whole(self._folder / name, data)
        return name

    def find(self, name: str) -> Path | None:
        """A picture that is still kept."""
        if _ID.fullmatch(name) is None:
            return None
        path = self._folder / name
        return path if path.is_file() and time.time() - path.stat().st_mtime < self._keep else None

    def expire(self) -> None:
        """Removes those whose time is over, and what a server that was killed had begun to write before that."""
        for path in [*self._folder.glob("img_*"), *self._folder.glob(f"{TEMPORARY}*")]:
            with suppress(FileNotFoundError):  # one that is being written has another name at its end
                if time.time() - path.stat().st_mtime >= self._keep:
                    path.unlink()
