"""The command line, ``ddit-rt``."""

from .root import app, main

__all__ = ["app", "main"]
