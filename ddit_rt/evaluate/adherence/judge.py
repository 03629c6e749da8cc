"""Prompt adherence on the demo model: what its prompts state, looked for in its pictures without any download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..metrics import Judge
from .network import load_reader, read, to_pictures
from .statements import parse


def adherence(batch: int = 32) -> Judge:
    """Loads prompt adherence: per picture, the share of its prompt's statements that the demo's reader finds in it.

    A prompt states that a shape is there, its colour and texture where they are said, the fence, and the background's
    kind and colour where they are said. Pictures of prompts outside the demo's grammar get no value, and the reader
    knows no other model's pictures.

    Args:
        batch: Pictures at a time.
    """
    net = load_reader()

    def judge(pictures: Sequence[Path], base: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        parsed = [(path, parse(prompt)) for path, prompt in zip(pictures, prompts, strict=True)]
        stated = [(path, statements) for path, statements in parsed if statements is not None]
        values = []
        for start in range(0, len(stated), batch):
            chunk = stated[start : start + batch]
            readings = read(to_pictures([Image.open(path) for path, _ in chunk]), net)
            values += [reading.share(statements) for reading, (_, statements) in zip(readings, chunk)]
        return values

    return judge


def adherence_note(prompts: Sequence[str]) -> str:
    """What the column is, and how many of the prompts have no value in it."""
    outside = sum(parse(prompt) is None for prompt in prompts)
    return (
        "Prompt adherence is the share of a prompt's statements (shape, colour, texture, fence, background) that a "
        f"small classifier finds in the picture; {outside} of {len(prompts)} prompts are outside the demo model's "
        "grammar and have no value."
    )
