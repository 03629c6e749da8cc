"""Where fitted schedules are kept and found again: one small JSON file each, by model and kind of call.

Any number of processes may read and write at once. A file appears whole or not at all, and is never changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, ConfigDict, TypeAdapter, ValidationError

from ..errors import ConfigError
from ..multiples import SKIP, SUPPORTED_MULTIPLES
from ..settings import read_text
from .bounds import PSNR_LIMIT, check_quality, check_speedup
from .call_key import CallKey
from .fitted import FittedSchedule

logger = logging.getLogger(__name__)

_ENDING, _UNFINISHED, _CLAIM = ".json", ".tmp", ".lock"
_ABANDONED_SECONDS = 3600  # a writer needs milliseconds
_SLOWER = 0.97  # a speed-up that is missed by less is met: FLOP of real runs differ by as much between sizes
_WORSE = 0.1  # dB, likewise
_warned: set[Path] = set()


@dataclass(frozen=True)
class StoredSchedule:
    """What a file of the store holds.

    Attributes:
        key: What the schedule holds for.
        fitted: The schedule.
        saved: When.
        name: Of the model, for people; empty if unknown.
        format: Of the file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    key: CallKey
    fitted: FittedSchedule
    saved: AwareDatetime
    name: str = ""
    format: Literal[1] = 1

    @property
    def quality(self) -> float:
        """PSNR in dB to the key's reference: to the converged pictures where it was measured and is asked for."""
        converged = getattr(self.fitted, "psnr_converged", None) if self.key.reference == "converged" else None
        return self.fitted.psnr if converged is None else converged

    @property
    def speedup(self) -> float:
        """By what the key says: of FLOP, or of the steps' seconds."""
        by_clock = self.fitted.seconds_speedup if self.key.costs == "seconds" else None
        return self.fitted.speedup if by_clock is None else by_clock

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {**asdict(self), "saved": self.saved.isoformat(timespec="seconds")}


_FILE = TypeAdapter(StoredSchedule)


class Located(NamedTuple):
    """A schedule, and the file that holds it."""

    fitted: FittedSchedule
    path: Path


class ScheduleStore:
    """The user's schedules, and beside them some that are only read.

    A file that cannot be read, or holds something else, is skipped, with one warning that names it.

    Args:
        root: Folder to keep schedules in; None takes ``schedules`` in :func:`cache_directory`. Made when needed.
        shipped: Further folders of the same form, never written to: schedules that came with a package or an adapter.

    Raises:
        ConfigError: ``root`` is None and there is no home directory.
    """

    def __init__(self, root: str | Path | None = None, shipped: Sequence[str | Path] = ()) -> None:
        self.root = cache_directory() / "schedules" if root is None else Path(root)
        self.shipped = tuple(Path(folder) for folder in shipped)

    def find(self, key: CallKey, **target: Any) -> FittedSchedule | None:
        """As :meth:`locate`, without the file."""
        found = self.locate(key, **target)
        return None if found is None else found.fitted

    def locate(
        self,
        key: CallKey,
        *,
        speedup: float | None = None,
        quality: float | None = None,
        multiples: Sequence[int] = SUPPORTED_MULTIPLES,
        fastest: float = math.inf,
    ) -> Located | None:
        """The best schedule for a call; give one of the two targets.

        Args:
            key: Of the call.
            speedup: Wanted ratio of FLOP, or of what the key counts. Of the schedules that reach it, or miss it by at
                most 3 %, the one with the highest PSNR.
            quality: Wanted PSNR in dB. Of the schedules that reach it, or miss it by at most 0.1 dB, the fastest.
            multiples: That steps may run at.
            fastest: Ratio of the same that a schedule may have at most.

        Returns:
            The schedule and its file; None where no stored schedule reaches the target.

        Raises:
            ConfigError: none or both of the targets are given, or one is no number that can be reached.
        """
        if (speedup is None) == (quality is None):
            raise ConfigError(f"speedup={speedup!r}, quality={quality!r}: give one of the two.")
        entries = [
            (entry, path)
            for entry, path in self._entries(key)
            if set(entry.fitted.schedule) <= {SKIP, *multiples} and entry.speedup <= fastest
        ]
        if speedup is not None:
            check_speedup(speedup)
            fast = [found for found in entries if found[0].speedup >= _SLOWER * speedup]
            best = max(fast, key=lambda found: (found[0].quality, found[0].speedup), default=None)
        else:
            assert quality is not None
            check_quality(quality)
            near = [found for found in entries if found[0].quality >= min(quality, PSNR_LIMIT) - _WORSE]
            best = max(near, key=lambda found: (found[0].speedup, found[0].quality), default=None)
        return None if best is None else Located(best[0].fitted, best[1])

    def holds_any(self) -> bool:
        """Whether there is a schedule for any call at all."""
        return any(path for root in (self.root, *self.shipped) for path in _files(root, f"*/*/*{_ENDING}"))

    def entries(self, key: CallKey) -> list[StoredSchedule]:
        """All schedules for a call, the user's own first."""
        return [entry for entry, _ in self._entries(key)]

    def _entries(self, key: CallKey) -> list[tuple[StoredSchedule, Path]]:
        folders = [root / key.directory for root in (self.root, *self.shipped)]
        paths = [path for folder in folders for path in _files(folder, f"*{_ENDING}")]
        return [(entry, path) for path in paths if (entry := _read(path)) is not None]

    def own_entries(self) -> list[StoredSchedule]:
        """All schedules that were saved here, for any model and call; the shipped ones are left out."""
        found = (_read(path) for path in _files(self.root, f"*/*/*{_ENDING}"))
        return [entry for entry in found if entry is not None]

    def save(self, key: CallKey, fitted: FittedSchedule, name: str = "") -> Path | None:
        """Keeps a schedule. The same one twice is one file.

        Args:
            key: What it holds for.
            fitted: The schedule.
            name: Of the model, for people.

        Returns:
            The file; None, after one warning, where the folder cannot be written to.
        """
        content = hashlib.sha256(json.dumps(asdict(fitted), sort_keys=True).encode()).hexdigest()[:16]
        path = self.root / key.directory / f"{fitted.speedup:.2f}x-{content}{_ENDING}"
        entry = StoredSchedule(key, fitted, datetime.now(UTC), name)
        try:
            _write(path, json.dumps(entry.to_dict(), indent=1) + "\n")
        except OSError as error:
            _warn(self.root, f"schedules cannot be kept in {self.root}, and are fitted anew in every process ({error})")
            return None
        return path

    @contextmanager
    def claim(self, key: CallKey) -> Iterator[bool]:
        """Within the context nobody else claims a key: whoever has it fits, everybody else need not.

        It never waits, and ends with the process, however that ends. Where the folder cannot be written to everybody
        has it, since what is fitted cannot be shared either.

        Args:
            key: Of the calls that a schedule is to be fitted to.

        Yields:
            Whether it is had; False while another process, or another thread of this one, has it.
        """
        path = self.root / key.directory / f"fit{_CLAIM}"
        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # also file systems that have no locks
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def clear(self) -> int:
        """Removes the user's own schedules, readable or not; files that lie elsewhere in the folder stay.

        Returns:
            How many there were.

        Raises:
            OSError: one cannot be removed.
        """
        removed = 0
        for path in _files(self.root, "*/*/*"):
            if path.suffix in (_ENDING, _UNFINISHED, _CLAIM):
                with suppress(FileNotFoundError):  # another process clears too
                    path.unlink()
                    removed += path.suffix == _ENDING
        for folder in (*_files(self.root, "*/*"), *_files(self.root, "*"), self.root):
            with suppress(OSError):  # holds something else, or a schedule that has just come
                folder.rmdir()
        return removed


def cache_directory() -> Path:
    """The user's folder for what can be computed again.

    ``DDIT_RT_CACHE`` if that is set, else ``ddit_rt`` in ``XDG_CACHE_HOME`` or ``~/.cache``, as Hugging Face's
    libraries do on every system.

    Raises:
        ConfigError: none of them is set and the user has no home directory.
    """
    own = os.environ.get("DDIT_RT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG rule: a relative path there is ignored
    chosen = Path(own) if own else Path(shared if os.path.isabs(shared) else "~/.cache") / "ddit_rt"
    try:
        return chosen.expanduser()
    except RuntimeError:
        raise ConfigError(f"{chosen}: there is no such home directory. Set DDIT_RT_CACHE to a folder.") from None


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from sorted(folder.glob(pattern))
    except OSError as error:
        _warn(folder, f"{folder} cannot be read, its schedules are not used ({error})")


def _read(path: Path) -> StoredSchedule | None:
    """What is in a file, if it is a schedule that belongs there."""
    try:
        entry = _FILE.validate_json(read_text(path, "schedule"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in first["loc"])
        _warn(path, f"{path} holds no schedule that this version reads, and is skipped ({place}{first['msg']})")
        return None
    except ConfigError as error:
        if path.exists():  # otherwise it has been cleared since the folder was read
            _warn(path, f"{error} It is skipped.")
        return None
    if path.parent.parts[-2:] != entry.key.directory.parts:
        _warn(path, f"{path} is skipped: its key belongs to {entry.key.directory}")
        return None
    schedule, aim = entry.fitted.schedule, entry.fitted.reference
    if len(schedule) != entry.key.steps or schedule[0] == SKIP or aim != entry.key.reference:
        _warn(
            path,
            f"{path} is skipped: a schedule of {len(schedule)} steps that begins with {schedule[0]} and aims at {aim} "
            f"serves no call of {entry.key.steps} steps that aims at {entry.key.reference}",
        )
        return None
    return entry


def _write(path: Path, text: str) -> None:
    """Puts a file in place in one go; what killed writers left there is removed."""
    for last in (False, True):
        temporary = path.parent / f".{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            break
        except FileNotFoundError:  # another process cleared the store meanwhile
            if last:
                raise
        finally:
            with suppress(OSError):
                temporary.unlink()
    for left in _files(path.parent, f"*{_UNFINISHED}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()


def _warn(path: Path, text: str) -> None:
    """Once per path and process: the store is looked into at every call."""
    if path not in _warned:
        _warned.add(path)
        logger.warning("%s", text)
