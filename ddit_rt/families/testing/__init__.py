"""The conformity kit: whether a family does all that the package promises, on a tiny pipeline of it."""

from .specimen import MakeCall, Specimen, randomise, run

__all__ = ["MakeCall", "Specimen", "randomise", "run"]
