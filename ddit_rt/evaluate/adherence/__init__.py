"""Prompt adherence on the demo model: how many of a prompt's statements can be seen in its picture."""

from .judge import adherence, adherence_note
from .network import Reading, load_reader, read, to_pictures
from .statements import Statement, parse

__all__ = ["Reading", "Statement", "adherence", "adherence_note", "load_reader", "parse", "read", "to_pictures"]
