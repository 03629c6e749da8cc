"""The SQLite database of video jobs: its schema, its transactions, its errors."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from .video_files import StorageError

_VERSION = 1
_PATIENCE = 30.0  # seconds that a transaction of another process may take
_SCHEMA = (
    """CREATE TABLE videos (
        id TEXT PRIMARY KEY, model TEXT NOT NULL, status TEXT NOT NULL, progress INTEGER NOT NULL,
        created_at INTEGER NOT NULL, completed_at INTEGER, expires_at INTEGER, seconds TEXT NOT NULL,
        size TEXT NOT NULL, prompt TEXT NOT NULL, error TEXT, ddit TEXT, request TEXT NOT NULL,
        attempts INTEGER NOT NULL, owner TEXT NOT NULL, files TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX by_owner ON videos (owner, id)",
    "CREATE INDEX by_status ON videos (status, owner, id)",
    # when each owner was served last, counted in claims; kept apart, for a deleted job may not bring its owner forward
    "CREATE TABLE turns (owner TEXT PRIMARY KEY, turn INTEGER NOT NULL) WITHOUT ROWID",
)
# of SQLite's result codes, those of a disk that takes no more; their low byte is the kind
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


class VideoDatabase:
    """One connection, shared by the threads of a process; other processes open their own on the same file.

    Args:
        path: Of the file; made where it is missing.

    Raises:
        ConfigError: the file is no database, or of another version.
        StorageError: the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connection, behind a statement of another thread: SQLite crashes where it is closed under one."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone and one statement.

        Raises:
            StorageError: the disk is full.
        """
        with self._lock:
            try:
                yield self._connection
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF in _NO_ROOM:
                    raise StorageError(
                        f"{self._path} cannot be written ({error}): free some room on its disk."
                    ) from None
                raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection in a transaction that no other writer is in; undone where the block raises.

        Raises:
            StorageError: the disk is full; nothing is changed.
        """
        with self.reading() as database:
            try:
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    def _open(self) -> None:
        try:
            self._use_log()
            self._connection.execute("PRAGMA synchronous = FULL")  # an accepted job outlives a power cut, too
            with self.transaction() as database:
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA:
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{self._path} cannot be used as a database of jobs ({error}): move it away.") from None
        if version not in (0, _VERSION):
            raise ConfigError(
                f"{self._path} has version {version}, this release reads {_VERSION}: take the release that wrote it, "
                "or move it away."
            )

    def _use_log(self) -> None:
        """Switches the write-ahead log on. SQLite does not wait here for another process that does the same."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                with self.reading() as database:
                    database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)
