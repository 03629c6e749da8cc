"""Jobs of videos, in SQLite and on disk: what was accepted outlives the server.

A job is queued, in progress, then completed or failed. Every change is one short transaction, flushed to the disk, so
that a kill loses no job at any moment. The row leads and the files follow: a file without a row is garbage, and a row
is completed only once its files are there.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, Self, get_args

from ..errors import ConfigError, DDiTError
from ..settings import is_whole, shown
from .video_database import VideoDatabase
from .video_files import StorageError, VideoFiles, is_video_id
from .video_job import COLUMNS, Recovery, Status, VideoJob, VideoPage, read_job

__all__ = [
    "QueueFullError",
    "Recovery",
    "StorageError",
    "VideoJob",
    "VideoNotFoundError",
    "VideoPage",
    "VideoStore",
]

MAX_ATTEMPTS = 2
MAX_PAGE = 100


class QueueFullError(DDiTError, RuntimeError):
    """As many jobs are queued as may be; the request can be sent again later."""


class VideoNotFoundError(DDiTError, LookupError):
    """There is no video of this id, or it is another owner's."""


class VideoStore:
    """The jobs of one server. Every process that works on them opens a store of its own on the same folder.

    Safe to use from several threads and processes; not carried over a fork. Ids begin with the time of creation, in
    microseconds: their order is the order of creation, which lists and claims follow, and which outlives a deletion.

    Args:
        folder: Holds the database and the files; made where it is missing. On a local disk, since SQLite's write-ahead
            log needs memory that the processes share.
        keep_seconds: How long a job and its files stay after the end of the work.
        clock: Seconds since 1970.
        max_queued: Queued jobs at most, of all owners.
        max_queued_per_owner: Queued jobs at most of one owner.

    Raises:
        ConfigError: a value is out of range, or the folder's database is none that this release reads.
        StorageError: the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        keep_seconds: float,
        clock: Callable[[], float] = time.time,
        max_queued: int = 1000,
        max_queued_per_owner: int = 100,
    ) -> None:
        for name, value in (
            ("keep_seconds", keep_seconds),
            ("max_queued", max_queued),
            ("max_queued_per_owner", max_queued_per_owner),
        ):
            if not value > 0:
                raise ConfigError(f"{name}={shown(value)}: a number above 0.")
        self._keep_seconds, self._clock = keep_seconds, clock
        self._max_queued, self._max_queued_per_owner = max_queued, max_queued_per_owner
        self._files = VideoFiles(folder / "files")
        self._database = VideoDatabase(folder / "jobs.sqlite3")

    def close(self) -> None:
        """Closes the database; the store cannot be used after."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- what a client asks for -------------------------------------------------------------------------------------

    def create(
        self,
        request: Mapping[str, Any],
        model: str,
        size: str,
        seconds: str,
        prompt: str,
        owner: str = "",
        now: float | None = None,
    ) -> VideoJob:
        """Queues a job.

        Args:
            request: All that a worker needs, as JSON has it.
            model: Name of the model.
            size: "WxH".
            seconds: Length of the video.
            prompt: What it shows.
            owner: Hash of the key that it was asked for with; "" where there are no keys.
            now: Time of creation; by default the clock's.

        Raises:
            QueueFullError: the owner, or all owners together, have as many jobs queued as may be.
            StorageError: the disk is full.
            TypeError, ValueError: the request is not JSON.
        """
        text = json.dumps(request, allow_nan=False)
        now = self._clock() if now is None else now
        with self._database.transaction() as database:
            (all_queued,) = database.execute("SELECT COUNT(*) FROM videos WHERE status = 'queued'").fetchone()
            if all_queued >= self._max_queued:
                raise QueueFullError(f"{all_queued} videos are queued, which is the limit: try again later.")
            (own,) = database.execute(
                "SELECT COUNT(*) FROM videos WHERE status = 'queued' AND owner = ?", (owner,)
            ).fetchone()
            if own >= self._max_queued_per_owner:
                raise QueueFullError(
                    f"{own} of your videos are queued, which is the limit: wait for one, or delete it."
                )
            (last,) = database.execute("SELECT MAX(id) FROM videos").fetchone()
            ticks = int(now * 1e6)
            if last is not None:  # later than the last one, also where the clock was put back
                ticks = max(ticks, int(last[6:20], 16) + 1)
            id = f"video_{ticks:014x}{token_hex(12)}"
            database.execute(
                f"INSERT INTO videos ({COLUMNS}) "
                "VALUES (?, ?, 'queued', 0, ?, NULL, NULL, ?, ?, ?, NULL, NULL, ?, 0, ?, '[]')",
                (id, model, int(now), seconds, size, prompt, text, owner),
            )
            return self._job(database, id)

    def get(self, id: str, owner: str = "") -> VideoJob:
        """A job of an owner.

        Raises:
            VideoNotFoundError: there is none; an id of another form counts as such.
        """
        with self._database.reading() as database:
            return self._job(database, id, owner)

    def list(
        self, owner: str = "", after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> VideoPage:
        """An owner's jobs by time of creation.

        Args:
            owner: As of :meth:`create`.
            after: Id of the last job of the page before; the job may be deleted meanwhile.
            limit: Jobs on the page, 1 to 100.
            order: "asc", oldest first, or "desc".

        Raises:
            ConfigError: ``limit`` or ``order`` is none of these.
            VideoNotFoundError: ``after`` does not have the form of an id.
        """
        if not is_whole(limit) or not 1 <= limit <= MAX_PAGE:
            raise ConfigError(f"limit={shown(limit)}: a whole number from 1 to {MAX_PAGE}.")
        if order not in ("asc", "desc"):
            raise ConfigError(f"order={shown(order)}: use 'asc' or 'desc'.")
        if after is not None and not is_video_id(after):
            raise _not_found(after)
        beyond = "" if after is None else f"AND id {'>' if order == 'asc' else '<'} ?"
        values = [owner, *([] if after is None else [after]), limit + 1]
        with self._database.reading() as database:
            rows = database.execute(
                f"SELECT {COLUMNS} FROM videos WHERE owner = ? {beyond} ORDER BY id {order} LIMIT ?", values
            ).fetchall()
        return VideoPage(tuple(map(read_job, rows[:limit])), len(rows) > limit)

    def path(self, id: str, owner: str, name: str) -> Path | None:
        """Where a file of a job lies; None where the job has none of this name (yet).

        Raises:
            VideoNotFoundError: as of :meth:`get`.
        """
        return self._files.path(id, name) if name in self.get(id, owner).files else None

    def delete(self, id: str, owner: str = "") -> None:
        """Removes a job in any state, and its files; the worker of one in progress learns it by :meth:`is_wanted`.

        Raises:
            VideoNotFoundError: as of :meth:`get`.
        """
        with self._database.transaction() as database:
            self._job(database, id, owner)
            database.execute("DELETE FROM videos WHERE id = ?", (id,))
        self._files.remove(id)

    def counts(self) -> dict[Status, int]:
        """How many jobs are in each state, for the metrics."""
        with self._database.reading() as database:
            found = dict(map(tuple, database.execute("SELECT status, COUNT(*) FROM videos GROUP BY status")))
        return {status: found.get(status, 0) for status in get_args(Status)}

    # -- what a worker does -----------------------------------------------------------------------------------------

    def claim(self) -> VideoJob | None:
        """Takes a queued job, which is in progress from now on; None if there is none.

        The owner that waited longest since its last turn comes next, and of its jobs the oldest. No job is handed out
        twice.
        """
        with self._database.transaction() as database:
            row = database.execute(
                "SELECT id, owner FROM videos LEFT JOIN turns USING (owner) WHERE status = 'queued' "
                "ORDER BY COALESCE(turn, 0), id LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE videos SET status = 'in_progress', progress = 0, attempts = attempts + 1 WHERE id = ?",
                (row["id"],),
            )
            database.execute(
                "INSERT INTO turns VALUES (?, (SELECT COALESCE(MAX(turn), 0) + 1 FROM turns)) "
                "ON CONFLICT (owner) DO UPDATE SET turn = excluded.turn",
                (row["owner"],),
            )
            return self._job(database, row["id"])

    def is_wanted(self, id: str) -> bool:
        """Whether a job is still in progress: it was not deleted, and nobody else ended it."""
        with self._database.reading() as database:
            row = database.execute("SELECT status FROM videos WHERE id = ?", (id,)).fetchone()
        return row is not None and row["status"] == "in_progress"

    def progress(self, id: str, percent: int) -> bool:
        """Notes how far a job is; False if it is not wanted any more.

        Raises:
            ConfigError: ``percent`` is not a whole number from 0 to 100.
        """
        if not is_whole(percent) or not 0 <= percent <= 100:
            raise ConfigError(f"percent={shown(percent)}: a whole number from 0 to 100.")
        return self._end_or_go_on(id, "progress = ?", percent)

    def write(self, id: str, name: str, data: bytes) -> Path | None:
        """Writes a file of a job in progress, whole or not at all; None if the job is not wanted any more.

        Raises:
            ConfigError: the name has capitals, a separator or more than one ending.
            StorageError: the disk is full; no partial file stays.
        """
        self._files.path(id, name)  # refuses before anything is looked up
        if not self.is_wanted(id):
            return None
        try:
            return self._files.write(id, name, data)
        except FileNotFoundError:
            if self.is_wanted(id):
                raise
            return None

    def complete(self, id: str, files: Sequence[str], ddit: Mapping[str, Any]) -> bool:
        """Ends a job with the files written; False if it is not wanted any more, and then none of its files stay.

        Args:
            id: Of the job.
            files: Names of its files; whatever else lies in its folder is removed.
            ddit: What was done, as JSON has it.

        Raises:
            ConfigError: a file is not there.
            StorageError: the disk is full; the job is still in progress.
        """
        text = json.dumps(ddit, allow_nan=False)
        missing = self._files.missing(id, files)
        if missing and self.is_wanted(id):
            raise ConfigError(f"files={shown(list(files))}: {shown(missing)} of {id} not written.")
        now = self._clock()
        done = self._end_or_go_on(
            id,
            "status = 'completed', progress = 100, completed_at = ?, expires_at = ?, files = ?, ddit = ?",
            *(int(now), int(now + self._keep_seconds), json.dumps(list(files)), text),
        )
        if done:
            self._files.keep(id, files)
        return done

    def fail(self, id: str, code: str, message: str) -> bool:
        """Ends a job with a reason, without files; False if it is not wanted any more.

        Raises:
            StorageError: the disk is full; the job is still in progress.
        """
        done = self._end_or_go_on(id, *self._failure(code, message))
        if done:
            self._files.remove(id)
        return done

    # -- what the server does ---------------------------------------------------------------------------------------

    def recover(self) -> Recovery:
        """Takes up the work of a server that is gone. To be called at start, before any worker runs.

        Jobs that were in progress are queued again, in their old place, or fail if that was their second attempt.
        Files of no completed job and partial ones are removed.
        """
        with self._database.transaction() as database:
            queued, failed = (
                [
                    row["id"]
                    for row in database.execute(
                        f"SELECT id FROM videos WHERE status = 'in_progress' AND attempts {side} ? ORDER BY id",
                        (MAX_ATTEMPTS,),
                    )
                ]
                for side in ("<", ">=")
            )
            for id in queued:
                database.execute("UPDATE videos SET status = 'queued', progress = 0 WHERE id = ?", (id,))
            change, *values = self._failure(
                "server_restarted",
                f"The server was restarted during each of {MAX_ATTEMPTS} attempts to make this video.",
            )
            for id in failed:
                database.execute(f"UPDATE videos SET {change} WHERE id = ?", (*values, id))
            rows = database.execute("SELECT id, files FROM videos WHERE status = 'completed'").fetchall()
        removed = self._files.sweep({row["id"]: json.loads(row["files"]) for row in rows})
        return Recovery(tuple(queued), tuple(failed), removed)

    def expire(self) -> tuple[str, ...]:
        """Removes the jobs past their time, with their files, and files whose job is gone; returns the jobs' ids."""
        folders = self._files.ids()  # before the rows: a folder that comes later has its row already
        with self._database.transaction() as database:
            now = self._clock()
            gone = [row["id"] for row in database.execute("SELECT id FROM videos WHERE expires_at <= ?", (now,))]
            database.executemany("DELETE FROM videos WHERE id = ?", [(id,) for id in gone])
            kept = {row["id"] for row in database.execute("SELECT id FROM videos")}
        for id in folders:
            if id not in kept:
                self._files.remove(id)
        return tuple(gone)

    # -- what these share ---------------------------------------------------------------------------------------------

    def _job(self, database: sqlite3.Connection, id: str, owner: str | None = None) -> VideoJob:
        row = None
        if is_video_id(id):
            row = database.execute(f"SELECT {COLUMNS} FROM videos WHERE id = ?", (id,)).fetchone()
        if row is None or owner not in (None, row["owner"]):
            raise _not_found(id)
        return read_job(row)

    def _failure(self, code: str, message: str) -> tuple[Any, ...]:
        return (
            "status = 'failed', expires_at = ?, error = ?",
            int(self._clock() + self._keep_seconds),
            json.dumps({"code": code, "message": message}),
        )

    def _end_or_go_on(self, id: str, change: str, *values: Any) -> bool:
        """Changes a job in progress; False if it is none. Files of a job that was deleted go."""
        with self._database.transaction() as database:
            changed = database.execute(
                f"UPDATE videos SET {change} WHERE id = ? AND status = 'in_progress'", (*values, id)
            ).rowcount
            exists = changed or database.execute("SELECT 1 FROM videos WHERE id = ?", (id,)).fetchone()
        if not exists:
            self._files.remove(id)
        return changed == 1


def _not_found(id: str) -> VideoNotFoundError:
    return VideoNotFoundError(f"there is no video {shown(id)}.")
