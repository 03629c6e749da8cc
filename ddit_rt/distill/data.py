"""What the base model is shown: prompts, a folder of captioned pictures, or a Hugging Face dataset of them.

Items that cannot be used are named: refused, or skipped and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image, UnidentifiedImageError

from ..errors import ConfigError
from ..families import Family
from ..trajectories import Recording, record

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
Report = Callable[[str], None]


class Source(Protocol):
    """Items that can be recorded in groups."""

    captions: Sequence[str]

    def describe(self) -> dict[str, Any]:
        """JSON-ready identity of the data, for the manifest of its recordings."""
        ...

    def record(
        self,
        pipe: Any,
        family: Family,
        call: Mapping[str, Any],
        items: Sequence[int],
        seed: int,
        max_steps: int | None = None,
    ) -> Recording:
        """The base model's trajectories for these items, all of one size; at most ``max_steps`` steps of them."""
        ...


class BadDataError(ConfigError):
    """An item of the data cannot be used; the text names it."""


@dataclass
class Checked:
    """Collects the items that cannot be used.

    Args:
        skip: Leave them out, instead of refusing the data.
        report: Told of every one.
    """

    skip: bool
    report: Report

    def bad(self, what: str) -> None:
        """Raises:
        BadDataError: unless such items are skipped.
        """
        if not self.skip:
            raise BadDataError(f"{what}. Mend or remove it, or pass --bad-data skip.")
        self.report(f"skipped: {what}")


def read_prompts(path: Path, checked: Checked) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        BadDataError: a line is empty or no UTF-8, or no line is left.
    """
    prompts = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            checked.bad(f"{path}:{number}: no UTF-8 text")
            continue
        if text:
            prompts.append(text)
        else:
            checked.bad(f"{path}:{number}: an empty prompt")
    if not prompts:
        raise BadDataError(f"{path} holds no prompt.")
    return prompts


class Prompts:
    """The base model's own pictures: whole trajectories from noise (the paper's synthetic data)."""

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions = list(captions)

    def describe(self) -> dict[str, Any]:
        return {"kind": "prompts", "items": len(self.captions), "digest": _digest(self.captions)}

    def record(
        self,
        pipe: Any,
        family: Family,
        call: Mapping[str, Any],
        items: Sequence[int],
        seed: int,
        max_steps: int | None = None,
    ) -> Recording:
        captions = [self.captions[item] for item in items]
        arguments = _arguments(call, captions, items, seed)
        return record(pipe, family, lambda: pipe(**arguments), captions, max_steps)


class Pictures:
    """Given pictures: noised to a random level, from where the base model denoises for some steps.

    Args:
        items: (path or name, caption) of each picture.
        open_picture: Item number -> RGB picture.
        steps: Denoising steps to record of each group.
    """

    def __init__(
        self, items: Sequence[tuple[str, str]], open_picture: Callable[[int], Image.Image], steps: int
    ) -> None:
        self.names = [name for name, _ in items]
        self.captions = [caption for _, caption in items]
        self._open, self._steps = open_picture, steps

    def describe(self) -> dict[str, Any]:
        digest = _digest([*self.names, *self.captions])
        return {"kind": "pictures", "items": len(self.captions), "digest": digest, "steps": self._steps}

    def record(
        self,
        pipe: Any,
        family: Family,
        call: Mapping[str, Any],
        items: Sequence[int],
        seed: int,
        max_steps: int | None = None,
    ) -> Recording:
        total = int(call.get("num_inference_steps", 50))
        generator = torch.Generator().manual_seed(mixed_seed(seed, items[0]))
        # enough steps left for a piece; strength 1 would be pure noise
        strength = float(torch.empty(()).uniform_(min(0.95, (self._steps + 1) / total), 1.0, generator=generator))
        captions = [self.captions[item] for item in items]
        size = (int(call["width"]), int(call["height"]))
        arguments = _arguments(call, captions, items, seed)
        arguments |= {"image": [fitted(self._open(item), size) for item in items], "strength": strength}
        sibling = AutoPipelineForImage2Image.from_pipe(pipe)
        sibling.set_progress_bar_config(disable=True)
        return record(pipe, family, lambda: sibling(**arguments), captions, min(max_steps or self._steps, self._steps))


def picture_folder(
    folder: Path, size: tuple[int, int], steps: int, checked: Checked, limit: int | None = None
) -> Pictures:
    """Pictures of a folder, each with its caption in a text file of the same name.

    Args:
        folder: Searched with its subfolders.
        size: Width and height in pixels that training needs; smaller pictures cannot be used.
        steps: See :class:`Pictures`.
        checked: What to do with pictures that cannot be used.
        limit: Take the first so many usable ones, by path, and look at no further; None takes all.

    Raises:
        BadDataError: an unreadable or too small picture, a missing or empty caption, or no picture at all.
    """
    items = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in PICTURES:
            continue
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.exists() else ""
        if not caption:
            checked.bad(f"{path}: no caption ({text.name} is {'empty' if text.exists() else 'missing'})")
            continue
        problem = _problem(path, size)
        if problem:
            checked.bad(f"{path}: {problem}")
            continue
        items.append((str(path), caption))
        if len(items) == limit:
            break
    if not items:
        raise BadDataError(f"{folder} holds no picture with a caption.")

    def open_picture(item: int) -> Image.Image:
        with Image.open(items[item][0]) as picture:
            return picture.convert("RGB")

    return Pictures(items, open_picture, steps)


def picture_dataset(
    rows: Iterable[Mapping[str, Any]],
    image_column: str,
    caption_column: str,
    limit: int,
    size: tuple[int, int],
    steps: int,
    checked: Checked,
) -> Pictures:
    """Pictures of a Hugging Face or WebDataset dataset, as ``datasets.load_dataset(..., streaming=True)`` yields rows.

    The first ``limit`` usable rows are kept in memory at the training size.

    Raises:
        BadDataError: as :func:`picture_folder`; rows are named by their number.
    """
    items: list[tuple[str, str]] = []
    pictures: list[Image.Image] = []
    for number, row in enumerate(rows):
        caption, picture = str(row.get(caption_column) or "").strip(), row.get(image_column)
        if not caption:
            checked.bad(f"row {number}: {caption_column!r} is empty")
        elif not isinstance(picture, Image.Image):
            checked.bad(f"row {number}: {image_column!r} is no picture")
        elif picture.width < size[0] or picture.height < size[1]:
            checked.bad(f"row {number}: {picture.width} x {picture.height} pixels, {size[0]} x {size[1]} are needed")
        else:
            items.append((f"row {number}", caption))
            pictures.append(fitted(picture.convert("RGB"), size))
        if len(items) == limit:
            break
    if not items:
        raise BadDataError("the dataset holds no picture with a caption.")
    return Pictures(items, pictures.__getitem__, steps)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales and crops about the centre to ``size`` (width, height)."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = (max(side, round(old * scale)) for side, old in zip(size, picture.size))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size[0], top + size[1]))


def _problem(path: Path, size: tuple[int, int]) -> str:
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            picture.load()
    except (UnidentifiedImageError, OSError, ValueError) as error:
        return f"unreadable ({error})"
    if width < size[0] or height < size[1]:
        return f"{width} x {height} pixels, {size[0]} x {size[1]} are needed"
    return ""


def _arguments(call: Mapping[str, Any], captions: list[str], items: Sequence[int], seed: int) -> dict[str, Any]:
    """Of a pipeline call for a group; a generator per item, so that its noise does not depend on its group."""
    arguments = {**call, "prompt": captions, "output_type": "latent"}
    arguments["generator"] = [torch.Generator().manual_seed(mixed_seed(seed, item)) for item in items]
    if isinstance(call.get("negative_prompt"), str):
        arguments["negative_prompt"] = [call["negative_prompt"]] * len(captions)
    return arguments


def mixed_seed(seed: int, item: int) -> int:
    """Of what is drawn for an item or a batch of a run with this seed; within what torch takes."""
    return (seed * 1_000_003 + item) % 2**63


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
