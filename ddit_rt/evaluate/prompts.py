"""Prompts of an evaluation: a file, a hub data set, a known benchmark, or captions of the demo model's own world."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..pipeline import DEMO, DEMO_256, SHIPPED
from ..settings import shown

BENCHMARKS = {
    "drawbench": ("sayakpaul/drawbench", "train", "Prompts"),
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt"),
    "coco": ("sayakpaul/coco-30-val-2014", "train", "caption"),
}
"""Name -> (hub id, split, column)."""

_LISTS = {DEMO_256: DEMO}  # of whose captions a model was trained on
OWN = {name: Path(__file__).parent / f"{_LISTS.get(name, name).replace('-', '_')}_prompts.txt" for name in SHIPPED}
"""Shipped model -> captions that its training data may have, one a line, none twice."""

_COLUMNS = ("prompt", "prompts", "caption", "text", "Prompt", "Prompts", "Caption")


def load_prompts(source: str, limit: int | None = None, required: int | None = None) -> list[str]:
    """Reads prompts.

    Args:
        source: ``"demo"`` or ``"demo-video"`` (captions drawn from the model's grammar); ``"drawbench"``,
            ``"partiprompts"`` or ``"coco"`` (from the hub, through ``datasets``); a hub id as ``owner/name``,
            ``owner/name:split`` or ``owner/name:split:column``; or a file: .txt (one a line), .csv or .tsv with a
            prompt column, .json or .jsonl (strings, objects with a prompt or caption, or COCO's annotation file).
        limit: Take the first so many; None for all (64 of a shipped model's).
        required: Of a shipped model's, so few are enough where there are fewer than ``limit``; None requires those.

    Raises:
        ConfigError: no such file, no prompt in it, or the hub cannot be reached.
    """
    path = Path(source)
    if source in OWN:
        prompts = own_prompts(source, limit, required)
    elif path.is_file():
        prompts = _from_file(path)
    elif path.suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl"):
        raise ConfigError(f"prompts={source!r}: there is no such file.")
    else:
        prompts = _from_hub(source, limit)
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()][:limit]
    if not prompts:
        raise ConfigError(f"prompts={source!r}: no prompt found.")
    return prompts


def own_prompts(model: str, count: int | None = None, required: int | None = None) -> list[str]:
    """Different captions of a shipped model's grammar, always the same ones.

    Args:
        model: Its name.
        count: How many; None takes 64, or all.
        required: So few are enough where there are fewer than ``count``; None requires those.

    Raises:
        ConfigError: more are required than there are, or the model's are not in this installation.
    """
    if not OWN[model].is_file():
        raise ConfigError(f"prompts={model!r}: this installation has no {OWN[model].name}; give a file of prompts.")
    prompts = OWN[model].read_text(encoding="utf-8").splitlines()
    required = required or count or 0
    if required > len(prompts):
        raise ConfigError(f"count={required}: there are {len(prompts)} {model} prompts; ask for fewer, or give a file.")
    return prompts[: count or 64]


def _from_file(path: Path) -> list[str]:
    name = f"prompts={str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no text in UTF-8 ({error}): save it as such.") from None
    match path.suffix:
        case ".csv" | ".tsv":
            rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
            return _column(rows, name)
        case ".jsonl":
            lines = enumerate(text.splitlines(), 1)
            return _column([_json(line, f"{name}, line {number}") for number, line in lines if line.strip()], name)
        case ".json":
            content = _json(text, name)
            if isinstance(content, dict):  # COCO: {"annotations": [{"caption": ...}, ...]}
                content = content.get("annotations", [])
            if not isinstance(content, list):
                raise ConfigError(f"{name} holds {shown(content)}: write a list of prompts, or COCO's annotations.")
            return _column(content, name)
        case _:
            return text.splitlines()


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({error}).") from None


def _column(rows: Iterable[Any], source: str, column: str | None = None) -> list[str]:
    entries = list(rows)
    columns = [column] if column else _COLUMNS
    first = next((entry for entry in entries if isinstance(entry, dict)), {})
    name = next((name for name in columns if name in first), None)
    if first and name is None:
        raise ConfigError(f"{source} has no prompt column; it has {', '.join(map(str, first))}.")
    prompts: list[Any] = [entry.get(name) if isinstance(entry, dict) else entry for entry in entries]
    for number, (entry, prompt) in enumerate(zip(entries, prompts, strict=True), 1):
        if not isinstance(prompt, str):
            wanted = f"a text as {name!r}" if name else "a text, or an object with a prompt"
            raise ConfigError(f"{source}, entry {number}: {shown(entry)} is no prompt: write {wanted}.")
    return prompts


def _from_hub(source: str, limit: int | None) -> list[str]:
    if source in BENCHMARKS:
        name, split, column = BENCHMARKS[source]
    else:
        name, split, column = (*source.split(":"), "", "")[:3]
        if "/" not in name:
            raise ConfigError(
                f"prompts={source!r}: give a file, a hub id (owner/name), {', '.join(map(repr, OWN))}, or one of "
                f"{', '.join(BENCHMARKS)}."
            )
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"prompts={source!r} comes from the hub: pip install 'ddit-rt[eval]', or give a local file."
        ) from None
    try:
        # streamed: a benchmark's pictures stay where they are
        stream = load_dataset(name, split=split or "train", streaming=True)
        rows = [row for _, row in zip(range(limit or 10**9), stream)]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"prompts={source!r}: {name} could not be read ({reason}). Give a local file.") from error
    return _column(rows, name, column or None)
