"""Results of a measuring program as JSON that survives being cut off, and what the numbers in it belong to."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = 2  # grows when a row's numbers mean something else than before
Row = dict[str, Any]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source() -> str:
    """Digest of the package's code: unlike the commit it also tells apart a tree with changes, or one without git."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("ddit_rt", "kernels") for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """Of the source; None where there is no git, or no repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, Any]:
    """What must be the same for a row not to be measured again."""
    packages = {name: _version(name) for name in ("triton", "diffusers", "torchao")}
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **packages,
        "python": platform.python_version(),
        "source": _source(),
        "protocol": PROTOCOL,
    }


def machine(cuda: bool) -> dict[str, Any]:
    """The device that the numbers come from, by name and size."""
    if not cuda:
        return {"gpu": "none (dry run on a CPU)"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def folder_of(out: Path, described: dict[str, Any]) -> Path:
    """The folder for one kind of GPU."""
    gpu = described["gpu"]
    return out / ("dry-run" if gpu.startswith("none") else re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-"))


class Store:
    """StepExecutor of measurements in one file, written anew after every row.

    Args:
        path: JSON file; what it holds is kept.
        keys: Names of the fields that identify a row.
        cuda: False for a dry run.
        again: Measure rows again that are there already.
    """

    def __init__(self, path: Path, keys: Sequence[str], cuda: bool, again: bool = False) -> None:
        self.path = path
        self._keys = tuple(keys)
        self._versions = versions()
        self._commit = _commit()
        self.content: dict[str, Any] = {"rows": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        self.content.update(dry_run=not cuda, machine=machine(cuda))
        self._new: set[tuple[Any, ...]] = set()
        self._again = again

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self._keys)

    def has(self, **key: Any) -> bool:
        """Whether the row was measured with the present versions, or has failed with them."""
        wanted = self._key(key)
        if self._again:
            return wanted in self._new
        return any(self._key(row) == wanted and row["versions"] == self._versions for row in self.rows)

    def put(self, row: Row) -> None:
        """Adds a row in place of an older one of the same key, and writes the file."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {**row, "versions": self._versions, "commit": self._commit, "date": now}
        self._new.add(self._key(row))
        self.content["rows"] = [other for other in self.rows if self._key(other) != self._key(row)] + [row]
        self.write()

    def current(self, entry: Any) -> bool:
        """Whether something written by :meth:`note` belongs to the present versions."""
        return isinstance(entry, dict) and entry.get("versions") == self._versions and not self._again

    def note(self, name: str, value: dict[str, Any]) -> None:
        """Keeps something that is no row, and writes the file."""
        self.content[name] = {**value, "versions": self._versions}
        self.write()

    def write(self) -> None:
        """Replaces the file in one go: whoever is stopped here leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)
