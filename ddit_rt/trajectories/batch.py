"""A folder of pictures, one per prompt of a file: made by any number of processes, completed by the next start.

A picture is written under another name and moved into place, and its record after it. So a killed process leaves no
half picture, and what has a record need not be made again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files import to_disk, write_text_whole
from .generation import save

MANIFEST = "manifest.jsonl"
_RUN, _RECORDS, _PARTS = "run.json", "records", ".parts"
_SLUG = 48  # letters of a prompt in a file's name
_MAX_SEED = 2**63 - 1  # as of the command's --seed


@dataclass(frozen=True)
class Item:
    """One prompt of a file.

    Attributes:
        line: Number of its line, from 1.
        prompt: Text.
        seed: Of its noise.
    """

    line: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files, without a suffix; it stays when lines are added behind."""
        words = re.sub(r"[\W_]+", "-", self.prompt.lower())[:_SLUG].strip("-")
        return f"{self.line:05d}-{words}" if words else f"{self.line:05d}"


def read_items(path: Path, seed: int) -> list[Item]:
    """The prompts of a file: .jsonl with an object ``{"prompt": ..., "seed": ...}`` a line, else a prompt a line.

    Args:
        path: UTF-8 text; empty lines count as lines and are no prompts.
        seed: Of the first line, one more for every line that follows; a line's own seed goes before.

    Raises:
        ConfigError: the file cannot be read or holds no prompt, or a line is not understood.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={str(path)!r} cannot be read: {error}. Give a text file in UTF-8.") from None
    items = []
    for line, written in enumerate(text.splitlines(), 1):
        if written.strip():
            given: dict[str, Any] = {"prompt": written.strip()}
            if path.suffix == ".jsonl":
                given = _entry(written, f"{path}, line {line}")
            items.append(Item(line, given["prompt"], given.get("seed", seed + line - 1)))
    if not items:
        raise ConfigError(f"prompts={str(path)!r}: no prompt found; write one a line.")
    return items


def _entry(written: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(written)
    except ValueError as error:  # that of a number of thousands of digits is no JSONDecodeError
        raise ConfigError(f"{where} is no JSON: {error}.") from None
    form = 'write {"prompt": "...", "seed": 3}, the seed if it is to have its own'
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ConfigError(f"{where}: {written.strip()} has no prompt; {form}.")
    unknown = sorted(set(entry) - {"prompt", "seed"})
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]!r} is not understood; {form}.")
    seed = entry.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"{where}: seed={seed!r} is no whole number from 0 to {_MAX_SEED}.")
    return entry


class PictureFolder:
    """Pictures, a record of each, and at the end a manifest of all.

    Args:
        folder: Is made if it is not there. Processes of several machines have to see the same one.
        run: What all pictures are made with, in JSON's types and dataclasses.

    Raises:
        ConfigError: the folder holds pictures that were made with something else.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self._records, self._parts = folder / _RECORDS, folder / _PARTS
        for made in (folder, self._records, self._parts):
            made.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(run, default=_plain))
        path = folder / _RUN
        if not path.exists():
            self._write(path, json.dumps(wanted, indent=2) + "\n")
        there = json.loads(path.read_text(encoding="utf-8"))
        for name in [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]:
            raise ConfigError(
                f"{folder} holds pictures made with {name}={there.get(name)!r}, and now it is {wanted.get(name)!r}: "
                "choose another --output, or remove it."
            )

    def clear(self) -> None:
        """Removes what killed processes left half written; for one process, while no other works here."""
        shutil.rmtree(self._parts)
        self._parts.mkdir()

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """The items that have no picture yet, or failed.

        Raises:
            ConfigError: a line had another prompt or seed when its picture was made.
        """
        return [item for item in items if not self._has(item)]

    def _has(self, item: Item) -> bool:
        record = self.record(item)
        if record is None or "file" not in record:
            return False
        for name in ("prompt", "seed"):
            if record[name] != getattr(item, name):
                raise ConfigError(
                    f"{self.folder} has line {item.line} with {name}={record[name]!r}, and now it is "
                    f"{getattr(item, name)!r}: choose another --output; lines may only be added behind."
                )
        return (self.folder / record["file"]).is_file()

    def add(self, item: Item, frames: torch.Tensor, suffix: str, fps: int, facts: Mapping[str, Any]) -> Path:
        """Writes an item's picture, and its record behind it.

        Args:
            item: Which.
            frames: As of :class:`Outcome`.
            suffix: Of the file, as for :func:`save`.
            fps: Frames per second of a video.
            facts: Further entries of the record, in JSON's types.
        """
        part = save(frames, self._parts / f"{item.name}{suffix}", fps)
        path = self.folder / part.name
        to_disk(part)
        os.replace(part, path)
        self._note(item, {"file": path.name, **facts})
        return path

    def fail(self, item: Item, error: BaseException) -> None:
        """Records why there is no picture of an item; the next start tries again."""
        self._note(item, {"error": f"{type(error).__name__}: {error}"})

    def record(self, item: Item) -> dict[str, Any] | None:
        """What is recorded of an item: ``line``, ``prompt``, ``seed``, and ``file`` with its facts, or ``error``."""
        try:
            return json.loads(self._record_of(item).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def count(self) -> int:
        """How many records there are."""
        return sum(1 for _ in self._records.iterdir())

    def finish(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Writes the manifest, the records in the order of the file, and returns them."""
        records = [record for record in map(self.record, items) if record is not None]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._write(self.folder / MANIFEST, "".join(lines))
        return records

    def _note(self, item: Item, more: Mapping[str, Any]) -> None:
        text = json.dumps({**dataclasses.asdict(item), **more}, ensure_ascii=False)
        self._write(self._record_of(item), text + "\n")

    def _record_of(self, item: Item) -> Path:
        return self._records / f"{item.line:05d}.json"

    def _write(self, path: Path, text: str) -> None:
        write_text_whole(path, text, self._parts)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
