"""Reads the demo model's pictures: how many of a prompt's statements can be seen in its picture."""

from .network import Reading, load_reader, read, to_pictures
from .statements import Statement, parse

__all__ = ["Reading", "Statement", "load_reader", "parse", "read", "to_pictures"]
