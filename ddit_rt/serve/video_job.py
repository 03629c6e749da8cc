"""A video job as its store hands it out, and how one is read from a row."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed"]

COLUMNS = (
    "id, model, status, progress, created_at, completed_at, expires_at, seconds, size, prompt, error, ddit, request, "
    "attempts, owner, files"
)
"""Of the table of jobs, those that :func:`read_job` reads."""


@dataclass(frozen=True)
class VideoJob:
    """A job as it stood when it was read. Times are whole seconds since 1970."""

    id: str
    model: str
    status: Status
    progress: int
    """Percent."""
    created_at: int
    completed_at: int | None
    expires_at: int | None
    """When the job and its files go; None while it is queued or in progress."""
    seconds: str
    size: str
    prompt: str
    error: Mapping[str, str] | None
    """``code`` and ``message`` of a failed job."""
    ddit: Mapping[str, Any] | None
    """What was done, of a completed job."""
    request: Mapping[str, Any]
    attempts: int
    """How often a worker has begun it."""
    owner: str
    files: tuple[str, ...]
    """Names of a completed job's files, see :meth:`VideoStore.path`."""


@dataclass(frozen=True)
class VideoPage:
    """A part of a list of jobs."""

    data: tuple[VideoJob, ...]
    has_more: bool

    @property
    def first_id(self) -> str | None:
        """None on an empty page."""
        return self.data[0].id if self.data else None

    @property
    def last_id(self) -> str | None:
        """What ``after`` takes for the next page; None on an empty one."""
        return self.data[-1].id if self.data else None


@dataclass(frozen=True)
class Recovery:
    """What :meth:`VideoStore.recover` found: ids of the jobs queued again and failed, and how many files it removed."""

    queued: tuple[str, ...]
    failed: tuple[str, ...]
    removed: int


def read_job(row: sqlite3.Row) -> VideoJob:
    """The job in a row of ``COLUMNS``."""
    values = dict(row)
    for name in ("error", "ddit", "request", "files"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return VideoJob(**{**values, "files": tuple(values["files"])})
