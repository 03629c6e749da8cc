"""Files of video jobs: one folder per job, every file whole or absent."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import ConfigError, DDiTError
from ..files import to_disk
from ..settings import shown

VIDEO_ID = re.compile(r"video_[0-9a-f]{38}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}(\.[a-z0-9]{1,8})?")
TEMPORARY = ".part-"
"""How files that are being written begin; no name that a file may have begins with a dot."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(DDiTError, OSError):
    """There is no room on the disk, or it does not take what is written; nothing was kept of it."""


def is_video_id(text: object) -> bool:
    """Whether a text has the form of an id; one that has not never reaches the file system."""
    return isinstance(text, str) and VIDEO_ID.fullmatch(text) is not None


class VideoFiles:
    """Folders named by ids of jobs. Safe to use from several threads and processes.

    Args:
        folder: Holds the jobs' folders and nothing else; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, id: str, name: str) -> Path:
        """Where a file of a job lies, or would lie.

        Raises:
            ConfigError: the id or the name has another form than those of this store.
        """
        if not is_video_id(id):
            raise ConfigError(f"id={shown(id)}: an id is 'video_' and 38 hexadecimal digits.")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"name={shown(name)}: take small letters, digits, - and _, then one ending.")
        return self.folder / id / name

    def write(self, id: str, name: str, data: bytes) -> Path:
        """Writes a file so that a reader sees all of it or none, also after a crash or a power cut.

        Raises:
            ConfigError: as of :meth:`path`.
            StorageError: the disk is full. The partial file is gone, an earlier one of this name still there.
            FileNotFoundError: the job's folder was removed meanwhile.
        """
        path = self.path(id, name)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise _translated(error, path, 0) from None
        write_whole(path, data)
        return path

    def missing(self, id: str, names: Collection[str]) -> list[str]:
        """Those of a job's files that are not there. Errors as of :meth:`path`."""
        return [name for name in names if not self.path(id, name).is_file()]

    def remove(self, id: str) -> None:
        """Removes a job's folder, if there is one."""
        shutil.rmtree(self.path(id, "any").parent, ignore_errors=True)

    def keep(self, id: str, names: Collection[str]) -> int:
        """Removes what lies in a job's folder except the files named; returns how many that were."""
        others = [path for path in self.path(id, "any").parent.glob("*") if path.name not in names]
        for path in others:
            path.unlink(missing_ok=True)
        return len(others)

    def ids(self) -> list[str]:
        """Of the jobs that have a folder."""
        return [entry.name for entry in os.scandir(self.folder) if is_video_id(entry.name)]

    def sweep(self, wanted: Mapping[str, Collection[str]]) -> int:
        """Removes every folder of no job in ``wanted`` and every file not named there; returns how many that were."""
        removed = 0
        for id in self.ids():
            removed += self.keep(id, wanted.get(id, ()))
            if id not in wanted:
                self.remove(id)
        return removed


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees all of it or none, also after a crash or a power cut.

    Raises:
        StorageError: the disk is full. The partial file is gone, an earlier one of this name still there.
        FileNotFoundError: the folder is not there.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        try:
            _write_new(temporary, data)
            os.replace(temporary, path)
            to_disk(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _translated(error, path, len(data)) from None


def _translated(error: OSError, path: Path, size: int) -> OSError:
    if error.errno not in _FULL:
        return error
    return StorageError(
        f"the disk has no room for {size} bytes of {path.name} ({error.strerror}): free some, or keep files shorter."
    )


def _write_new(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)
