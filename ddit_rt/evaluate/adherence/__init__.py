"""Prompt adherence on the demo model: how many of a prompt's statements can be seen in its picture."""

from .judge import adherence, adherence_note
from .network import CELLS, SIDE, WEIGHTS, ReaderNet, Reading, load_reader, read, to_pictures
from .statements import FIELDS, Statement, parse
from .vocabulary import BACKGROUNDS, COLOURS, MANY_WORDS, RGB, SHAPES, TEXTURES

__all__ = [
    "BACKGROUNDS",
    "CELLS",
    "COLOURS",
    "FIELDS",
    "MANY_WORDS",
    "RGB",
    "SHAPES",
    "SIDE",
    "TEXTURES",
    "WEIGHTS",
    "ReaderNet",
    "Reading",
    "Statement",
    "adherence",
    "adherence_note",
    "load_reader",
    "parse",
    "read",
    "to_pictures",
]
