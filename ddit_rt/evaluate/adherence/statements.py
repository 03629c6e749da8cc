"""What a caption of the demo's grammar states, one checkable statement at a time."""

from __future__ import annotations

from dataclasses import dataclass

from .vocabulary import BACKGROUNDS, COLOURS, MANY_WORDS, SHAPES, TEXTURES

FIELDS = ("shape", "colour", "texture", "fence", "background kind", "background colour")
_SINGULAR = {plural: shape for shape, plural in SHAPES.items()} | {shape: shape for shape in SHAPES}
_ARTICLES = ("a", "an", "the")
_COUNTS = (*_ARTICLES, *MANY_WORDS, "two")
_OPENING = ["a", "picture", "of"]


@dataclass(frozen=True)
class Statement:
    """One thing a caption says.

    Attributes:
        field: One of `FIELDS`.
        value: A shape, a colour, a texture, a background kind, or "fence".
        shape: For colour and texture, the shape they are said of; "" otherwise.
    """

    field: str
    value: str
    shape: str = ""


def parse(caption: str) -> tuple[Statement, ...] | None:
    """The statements of a caption, each once and in its order; None if it is outside the grammar.

    In the grammar is what `scenes.caption` writes, in any case, with any article: noun phrases joined by "and" or
    "with", then "behind a fence", then "on a KIND COLOUR background". How many things a phrase speaks of is no
    statement.
    """
    words = caption.lower().split()
    if words[:3] == _OPENING:
        words = words[3:]
    try:
        return tuple(dict.fromkeys(_Parser(words).caption()))
    except _OutsideGrammarError:
        return None


class _OutsideGrammarError(Exception):
    """A word that the grammar does not have at this place."""


class _Parser:
    """Recursive descent over the words of one caption."""

    def __init__(self, words: list[str]) -> None:
        self._left = words

    def caption(self) -> list[Statement]:
        statements = self._noun_phrase()
        while self._take("and", "with"):
            statements += self._noun_phrase()
        if self._take("behind"):
            self._take(*_ARTICLES)
            self._need("fence")
            statements.append(Statement("fence", "fence"))
        if self._take("on"):
            self._take(*_ARTICLES)
            if kind := self._take(*BACKGROUNDS):
                statements.append(Statement("background kind", kind))
            if colour := self._take(*COLOURS):
                statements.append(Statement("background colour", colour))
            self._need("background")
        if self._left:
            raise _OutsideGrammarError
        return statements

    def _noun_phrase(self) -> list[Statement]:
        self._take(*_COUNTS)
        said: dict[str, str] = {}
        while adjective := self._take(*COLOURS, *TEXTURES):
            field = "colour" if adjective in COLOURS else "texture"
            if field in said:
                raise _OutsideGrammarError
            said[field] = adjective
        shape = _SINGULAR[self._need(*_SINGULAR)]
        return [Statement("shape", shape), *(Statement(field, value, shape) for field, value in said.items())]

    def _take(self, *choices: str) -> str:
        """The next word if it is one of these, and past it; "" otherwise."""
        return self._left.pop(0) if self._left and self._left[0] in choices else ""

    def _need(self, *choices: str) -> str:
        word = self._take(*choices)
        if not word:
            raise _OutsideGrammarError
        return word
