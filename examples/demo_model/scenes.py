"""Procedural captioned scenes: what the demo model is trained on.

A `Scene` is a resolution-independent description (all lengths are fractions of the picture's side). `sample_scene`
draws one, `caption` describes part of it and leaves the rest open (place, size, often the background, unnamed small
objects), and `render` paints it at any size, antialiased by supersampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from ddit_rt.evaluate.adherence import BACKGROUNDS, COLOURS, MANY_WORDS, RGB, SHAPES, TEXTURES

from .shapes import Thing, draw_fence, draw_pattern, draw_thing

_EXTRA_WORDS = ("a", "an", "and", "on", "in", "with", "the", "behind", "fence", "background", "of", "picture", "two")
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys([*_EXTRA_WORDS, *MANY_WORDS, *COLOURS, *SHAPES, *SHAPES.values(), *TEXTURES, *BACKGROUNDS])
)
_SHAPE_WEIGHTS = [3 if shape in ("zebra", "apple", "ball", "star", "square") else 2 for shape in SHAPES]
_SMALL_SHAPES = ("ball", "square", "triangle", "star", "ring", "heart")


@dataclass(frozen=True)
class Noun:
    """What a caption may say about one group of things; `colour` is None where the caption never names one."""

    shape: str
    colour: str | None
    texture: str
    many: bool


@dataclass(frozen=True)
class Background:
    """`kind` is one of `BACKGROUNDS`; `period` is a fraction of the side, `angle` in radians."""

    kind: str
    colour_name: str
    colour: RGB
    second: RGB
    angle: float
    period: float


@dataclass(frozen=True)
class Scene:
    """Things back to front, the nouns a caption may name, the background and the foreground fence (its colour)."""

    things: tuple[Thing, ...]
    nouns: tuple[Noun, ...]
    background: Background
    fence: RGB | None
    fence_period: float


@dataclass(frozen=True)
class Span:
    """Words of a caption and what they speak of: an index into `Scene.nouns`, "background", "fence" or None."""

    words: tuple[str, ...]
    about: int | str | None


def jitter(rng: Random, colour: RGB, amount: int = 16) -> RGB:
    """A colour near `colour`."""
    r, g, b = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return r, g, b


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    r, g, b_ = (round(x * (1 - share) + y * share) for x, y in zip(a, b, strict=True))
    return r, g, b_


def pattern_colour(rng: Random, name: str, colour: RGB) -> RGB:
    """The second colour of a texture: light on dark colours, dark on light ones, either in between."""
    if name == "black":
        return jitter(rng, (225, 225, 225), 10)
    if name in ("white", "yellow"):
        return jitter(rng, (60, 60, 70), 20)
    light = rng.random() < 0.7
    return _mix(colour, (250, 250, 250), 0.85) if light else _mix(colour, (10, 10, 15), 0.75)


def _thing(rng: Random, noun: Noun, x: float, y: float, radius: float, colour: RGB, second: RGB) -> Thing:
    tilt = rng.uniform(-0.25, 0.25)
    period = rng.uniform(0.36, 0.55) if radius > 0.2 else rng.uniform(0.5, 0.65)
    return Thing(
        noun.shape, colour, noun.texture, second, x, y, radius, tilt,
        rng.choice((0.0, math.pi / 2, math.pi / 4, -math.pi / 4)) if noun.texture == "striped" else 0.0,
        period * radius,
    )  # fmt: skip


def _sample_noun(rng: Random, many: bool, avoid: set[str], shape: str | None = None) -> Noun:
    shape = shape or rng.choices(list(SHAPES), _SHAPE_WEIGHTS)[0]
    if shape == "zebra":
        return Noun("zebra", None, "striped", many)
    names = [name for name in COLOURS if name not in avoid]
    # The commonest apple is red, as a person would expect of the word.
    colour = "red" if shape == "apple" and "red" in names and rng.random() < 0.3 else rng.choice(names)
    texture = rng.choices(TEXTURES, (9, 5, 4, 4))[0]
    return Noun(shape, colour, texture, many)


def sample_background(
    rng: Random, kinds: Sequence[str] = BACKGROUNDS, weights: Sequence[float] = (11, 4, 3, 3)
) -> Background:
    """Draw a background of one of `kinds`."""
    kind = rng.choices(kinds, weights)[0]
    name = rng.choices(list(COLOURS), [3 if c in ("black", "white") else 1 for c in COLOURS])[0]
    base = jitter(rng, COLOURS[name], 12)
    if name not in ("black", "white"):
        # Paler than an object of the same name, so that objects stand out.
        base = _mix(base, (255, 255, 255), rng.uniform(0.1, 0.35))
    if kind == "gradient":
        other = rng.choice([c for c in COLOURS if c != name])
        second = jitter(rng, COLOURS[other], 12)
    else:
        towards = (255, 255, 255) if sum(base) < 330 else (20, 20, 30)
        second = _mix(base, towards, rng.uniform(0.25, 0.4))
    angle = rng.choice((0.0, math.pi / 2, math.pi / 4, -math.pi / 4)) if kind != "checked" else 0.0
    return Background(kind, name, base, second, angle, rng.uniform(0.16, 0.3))


def _scatter(rng: Random, count: int, radius: float, taken: list[tuple[float, float, float]]) -> list:
    """Up to `count` centres whose discs stay inside and overlap the `taken` ones and each other little."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(count * 12):
        if len(placed) == count:
            break
        margin = radius * 0.95
        x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
        if all(math.hypot(x - a, y - b) > 0.92 * (radius + r) for a, b, r in [*taken, *placed]):
            placed.append((x, y, radius))
    return placed


def sample_scene(rng: Random) -> Scene:
    """Draw one scene; the same `rng` state gives the same scene."""
    background = sample_background(rng)
    fenced = rng.random() < 0.13
    layout = rng.choices(("one", "two", "many", "many and one"), (40, 30, 24, 6))[0]
    if fenced:
        layout = rng.choice(("one", "two", "many", "many"))
    avoid = {background.colour_name}
    shape = "zebra" if fenced and rng.random() < 0.4 else None
    nouns = [_sample_noun(rng, layout.startswith("many"), avoid, shape)]
    if layout in ("two", "many and one"):
        nouns.append(_sample_noun(rng, False, avoid))

    taken: list[tuple[float, float, float]] = []
    things: list[Thing] = []
    # Single objects are placed first: they are the larger ones and need the room.
    for noun in sorted(nouns, key=lambda noun: noun.many):
        if noun.many:
            count = rng.randint(4, 9)
            radius = rng.uniform(0.13, 0.19) if count < 7 else rng.uniform(0.11, 0.15)
        else:
            count = 1
            radius = rng.uniform(0.24, 0.42) if len(nouns) == 1 else rng.uniform(0.19, 0.28)
        places: list = []
        while len(places) < min(count, 3):
            places = _scatter(rng, count, radius, taken)
            radius *= 0.93
        name = noun.colour or "black"
        colour = jitter(rng, COLOURS[name])
        second = pattern_colour(rng, name, colour)
        things += [_thing(rng, noun, x, y, r * rng.uniform(0.92, 1.0), colour, second) for x, y, r in places]
        taken += places

    extras: list[Thing] = []
    for _ in range(rng.choices((0, 1, 2, 3), (5, 2, 2, 1))[0]):
        for x, y, radius in _scatter(rng, 1, rng.uniform(0.055, 0.09), taken):
            name = rng.choice([c for c in COLOURS if c not in avoid])
            small = Noun(rng.choice(_SMALL_SHAPES), name, "plain", False)
            extras.append(_thing(rng, small, x, y, radius, jitter(rng, COLOURS[name]), COLOURS[name]))
            taken.append((x, y, radius))
    things.sort(key=lambda thing: thing.y)
    fence = jitter(rng, rng.choice(((150, 95, 50), (240, 240, 235), (110, 110, 115))), 10) if fenced else None
    return Scene((*extras, *things), tuple(nouns), background, fence, rng.uniform(0.15, 0.22))


def _noun_words(rng: Random, noun: Noun) -> tuple[str, ...]:
    adjectives = []
    if noun.texture != "plain" and noun.shape != "zebra":
        adjectives.append(noun.texture)
    elif noun.shape != "zebra" and rng.random() < 0.06:
        adjectives.append("plain")
    if noun.colour is not None and rng.random() < 0.93:
        adjectives.append(noun.colour)
    if rng.random() < 0.15:
        adjectives.reverse()
    words = [*adjectives, SHAPES[noun.shape] if noun.many else noun.shape]
    if noun.many:
        if rng.random() < 0.7:
            words.insert(0, rng.choices(MANY_WORDS, (3, 1, 1))[0])
    else:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return tuple(words)


def caption_spans(scene: Scene, rng: Random) -> list[Span]:
    """The caption as spans, each with what it speaks of (the labels of the text encoders' pre-training)."""
    spans: list[Span] = [Span(("a", "picture", "of"), None)] if rng.random() < 0.05 else []
    order = list(range(len(scene.nouns)))
    rng.shuffle(order)
    for rank, index in enumerate(order):
        if rank:
            spans.append(Span((rng.choices(("and", "with"), (5, 1))[0],), None))
        spans.append(Span(_noun_words(rng, scene.nouns[index]), index))
    if scene.fence is not None:
        spans.append(Span(("behind", "a", "fence"), "fence"))
    if rng.random() < (0.25 if scene.fence is not None else 0.45):
        background = scene.background
        words = ["on", "a"]
        if background.kind != "plain":
            words.append(background.kind)
        # A gradient has two colours, and naming one would be half the truth.
        if background.kind == "plain" or (background.kind != "gradient" and rng.random() < 0.35):
            words.append(background.colour_name)
        if words[2][0] in "aeiou":
            words[1] = "an"
        spans.append(Span((*words, "background"), "background"))
    return spans


def caption(scene: Scene, rng: Random) -> str:
    """A caption that names the main objects and leaves place, size and often the background open."""
    return " ".join(word for span in caption_spans(scene, rng) for word in span.words)


def paint_background(background: Background, side: int) -> Image.Image:
    """A square canvas of `side` pixels with the background alone."""
    if background.kind == "gradient":
        ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
        along = ramp[None, :] * math.cos(background.angle) + ramp[:, None] * math.sin(background.angle)
        share = ((along - along.min()) / (along.max() - along.min()))[..., None]
        pixels = np.array(background.colour) * (1 - share) + np.array(background.second) * share
        return Image.fromarray(pixels.round().astype(np.uint8))
    canvas = Image.new("RGB", (side, side), background.colour)
    draw_pattern(
        ImageDraw.Draw(canvas), background.kind, background.second, side, background.period * side, background.angle
    )
    return canvas


def _paint(scene: Scene, side: int) -> Image.Image:
    canvas = paint_background(scene.background, side)
    for thing in scene.things:
        draw_thing(canvas, thing)
    if scene.fence is not None:
        draw_fence(canvas, scene.fence, scene.fence_period)
    return canvas


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Paint `scene` at `size` pixels a side: uint8 (size, size, 3)."""
    return render_pyramid(scene, (size,))[0]


def render_pyramid(scene: Scene, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """`render` at several sizes from one painting; each size divides the supersampled side, three times the largest."""
    side = max(3 * max(sizes), 192)
    if any(size < 1 or side % size for size in sizes):
        raise ValueError(f"sizes {sizes} must be positive and divide {side}: choose powers of two times the smallest")
    canvas = _paint(scene, side)
    return [np.asarray(canvas.reduce(side // size)) for size in sizes]
