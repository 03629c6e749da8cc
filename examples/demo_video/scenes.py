"""Procedural captioned moving scenes: what the demo video model is trained on.

A `Clip` describes things, how they move, a background that may drift and a fence before it all, in fractions of the
picture's side and of the clip's length. `sample_clip` draws one, `caption_spans` says part of it and leaves the rest
open (paths, sizes, speeds, often the background), and `render` paints its frames at any size, antialiased by
supersampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from ddit_rt.evaluate.adherence import COLOURS, RGB
from examples.demo_model import scenes as pictures
from examples.demo_model.scenes import Background, Noun, Span
from examples.demo_model.shapes import Thing, draw_fence, draw_pattern, draw_thing

SHAPES = ("ball", "square", "triangle", "star", "heart", "house", "tree", "fish")
TEXTURES = ("plain", "striped")
BACKGROUNDS = ("plain", "gradient", "striped", "checked")
MOTIONS: dict[str, tuple[str, ...]] = {
    "still": (),
    "left": ("moves", "left"),
    "right": ("moves", "right"),
    "up": ("moves", "up"),
    "down": ("moves", "down"),
    "bounce": ("bounces",),
    "turn": ("turns",),
    "circle": ("circles",),
    "grow": ("grows",),
    "shrink": ("shrinks",),
}
"""Motion -> what a caption calls it."""

_WORDS = ("a", "an", "and", "on", "behind", "fence", "background", "drifting", "still")
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*_WORDS, *COLOURS, *SHAPES, *TEXTURES, *BACKGROUNDS, *(w for words in MOTIONS.values() for w in words)]
    )
)
CLIP_FRAMES = 13
"""Frames that a motion is laid out for; a longer clip goes on at the same speed."""

_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Actor:
    """A thing at time 0, its motion, how far or fast that goes, and where in its period it begins."""

    thing: Thing
    motion: str
    amount: float
    phase: float

    def at(self, time: float) -> Thing:
        """The thing at `time` (1 is the last of `CLIP_FRAMES` frames)."""
        thing = self.thing
        if self.motion in _DIRECTIONS:
            dx, dy = _DIRECTIONS[self.motion]
            return replace(thing, x=thing.x + dx * self.amount * time, y=thing.y + dy * self.amount * time)
        if self.motion == "bounce":
            height = 0.42 * abs(math.sin(math.pi * (self.phase + self.amount * time)))
            return replace(thing, y=0.94 - thing.radius - height)
        if self.motion == "turn":
            angle = self.amount * time
            return replace(thing, angle=thing.angle + angle, pattern_angle=thing.pattern_angle + angle)
        if self.motion == "circle":
            turn = 2 * math.pi * (self.phase + self.amount * time)
            return replace(thing, x=thing.x + 0.2 * math.cos(turn), y=thing.y + 0.2 * math.sin(turn))
        if self.motion in ("grow", "shrink"):
            scale = math.exp(self.amount * (time if self.motion == "grow" else -time))
            scaled = thing.radius * min(2.2, max(0.4, scale))
            return replace(thing, radius=scaled, pattern_period=thing.pattern_period * scaled / thing.radius)
        return thing


@dataclass(frozen=True)
class Clip:
    """Actors back to front with the nouns that captions may name; drift is in periods of the pattern per clip."""

    actors: tuple[Actor, ...]
    nouns: tuple[Noun, ...]
    background: Background
    drift: float
    fence: RGB | None
    fence_period: float
    behind: bool
    """The first of two things passes behind the second, and a caption says so."""

    def at(self, time: float) -> pictures.Scene:
        """The scene at `time`, its background as at time 0."""
        things = tuple(actor.at(time) for actor in self.actors)
        return pictures.Scene(things, self.nouns, self.background, self.fence, self.fence_period)


def _noun(rng: Random, avoid: set[str]) -> Noun:
    colour = rng.choice([name for name in COLOURS if name not in avoid])
    return Noun(rng.choice(SHAPES), colour, rng.choices(TEXTURES, (3, 1))[0], many=False)


def _actor(rng: Random, noun: Noun, motion: str, radius: float, centre: tuple[float, float]) -> Actor:
    name = noun.colour or "black"
    colour = pictures.jitter(rng, COLOURS[name])
    second = pictures.pattern_colour(rng, name, colour)
    x, y = centre
    amount, phase = 0.0, rng.random()
    if motion in _DIRECTIONS:
        amount = rng.uniform(0.3, 0.62)
        dx, dy = _DIRECTIONS[motion]
        x, y = x - dx * amount / 2, y - dy * amount / 2
    elif motion == "bounce":
        amount = rng.choice((1.0, 1.5, 2.0))
    elif motion == "turn":
        amount = rng.choice((-1, 1)) * rng.uniform(1.5, 3.2)
    elif motion == "circle":
        amount = rng.choice((-1, 1)) * rng.uniform(0.6, 1.1)
    elif motion in ("grow", "shrink"):
        amount = rng.uniform(0.5, 0.8)
        radius *= 0.75 if motion == "grow" else 1.25
    stripes = rng.choice((0.0, math.pi / 2, math.pi / 4)) if noun.texture == "striped" else 0.0
    thing = Thing(
        noun.shape, colour, noun.texture, second, x, y, radius, rng.uniform(-0.15, 0.15), stripes,
        rng.uniform(0.45, 0.6) * radius,
    )  # fmt: skip
    return Actor(thing, motion, amount, phase)


def _motion(rng: Random, noun: Noun, choices: tuple[str, ...] = tuple(MOTIONS)) -> str:
    weights = {"still": 1.0, "left": 2, "right": 2, "up": 1.3, "down": 1.3, "bounce": 2, "turn": 2, "circle": 1.5}
    motion = rng.choices(choices, [weights.get(choice, 1.0) for choice in choices])[0]
    # nobody sees a plain ball turn
    return "bounce" if motion == "turn" and noun.shape == "ball" and noun.texture == "plain" else motion


def sample_clip(rng: Random) -> Clip:
    """Draw one clip; the same `rng` state gives the same clip."""
    background = pictures.sample_background(rng, BACKGROUNDS, (8, 4, 3, 3))
    drift = 0.0
    if background.kind in ("striped", "checked") and rng.random() < 0.5:
        drift = rng.choice((-1, 1)) * rng.uniform(0.8, 1.8)
    layout = rng.choices(("one", "two", "behind"), (50, 30, 20))[0]
    avoid = {background.colour_name}
    first = _noun(rng, avoid)
    if layout == "one":
        radius = rng.uniform(0.2, 0.32)
        motion = _motion(rng, first)
        actors, nouns = [_actor(rng, first, motion, radius, _near(rng, 0.5, 0.5))], [first]
    else:
        second = _noun(rng, avoid | {first.colour or ""})
        nouns = [first, second]
        if layout == "two":
            left = rng.random() < 0.5
            places = [(0.27, 0.5), (0.73, 0.5)] if left else [(0.73, 0.5), (0.27, 0.5)]
            # side by side: nothing that moves across
            choices = ("still", "up", "down", "bounce", "turn", "grow", "shrink")
            actors = [
                _actor(rng, noun, _motion(rng, noun, choices), rng.uniform(0.15, 0.2), _near(rng, *place))
                for noun, place in zip(nouns, places, strict=True)
            ]
        else:
            passing = _actor(
                rng, first, _motion(rng, first, ("left", "right", "up", "down")), rng.uniform(0.16, 0.22),
                _near(rng, 0.5, 0.5),
            )  # fmt: skip
            front = _actor(
                rng, second, _motion(rng, second, ("still", "turn")), rng.uniform(0.16, 0.24), _near(rng, 0.5, 0.5)
            )
            actors = [passing, front]
    fence = None
    if rng.random() < 0.12:
        fence = pictures.jitter(rng, rng.choice(((150, 95, 50), (240, 240, 235), (110, 110, 115))), 10)
    return Clip(tuple(actors), tuple(nouns), background, drift, fence, rng.uniform(0.15, 0.22), layout == "behind")


def _near(rng: Random, x: float, y: float) -> tuple[float, float]:
    return x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.09, 0.09)


def _article(words: list[str]) -> list[str]:
    return ["an" if words[0][0] in "aeiou" else "a", *words]


def _noun_words(rng: Random, noun: Noun, motion: str) -> tuple[str, ...]:
    words = ["striped"] if noun.texture == "striped" else []
    if noun.colour is not None and rng.random() < 0.93:
        words.append(noun.colour)
    return (*_article([*words, noun.shape]), *MOTIONS[motion])


def caption_spans(clip: Clip, rng: Random) -> list[Span]:
    """The caption as spans, each with what it speaks of: an index of a noun, "background", "fence" or None."""
    order = list(range(len(clip.nouns)))
    if not clip.behind:
        rng.shuffle(order)
    spans: list[Span] = []
    for rank, index in enumerate(order):
        if rank:
            spans.append(Span(("behind" if clip.behind else "and",), None))
        spans.append(Span(_noun_words(rng, clip.nouns[index], clip.actors[index].motion), index))
    if clip.fence is not None:
        spans.append(Span(("behind", "a", "fence"), "fence"))
    if rng.random() < (0.75 if clip.drift else 0.5):
        background = clip.background
        words = ["drifting"] if clip.drift else []
        if background.kind != "plain":
            words.append(background.kind)
        # a gradient has two colours, and naming one would be half the truth
        if background.kind == "plain" or (background.kind != "gradient" and rng.random() < 0.5):
            words.append(background.colour_name)
        spans.append(Span(("on", *_article([*words, "background"])), "background"))
    return spans


def caption(clip: Clip, rng: Random) -> str:
    """A caption that names things and motions and leaves paths, sizes, speeds and often the background open."""
    return " ".join(word for span in caption_spans(clip, rng) for word in span.words)


def _backdrop(clip: Clip, side: int) -> tuple[Image.Image, int]:
    """The background on a canvas that is wider by a margin on every side, so that it can drift."""
    margin = math.ceil(clip.background.period * side) + 2 if clip.drift else 0
    background = clip.background
    if background.kind == "gradient":
        return pictures.paint_background(background, side), 0
    canvas = Image.new("RGB", (side + 2 * margin,) * 2, background.colour)
    draw_pattern(
        ImageDraw.Draw(canvas), background.kind, background.second, side + 2 * margin, background.period * side,
        background.angle,
    )  # fmt: skip
    return canvas, margin


def render(clip: Clip, sizes: tuple[int, ...], frames: int = CLIP_FRAMES) -> list[np.ndarray]:
    """Paint `frames` frames: uint8 (frames, size, size, 3) for every size; sizes divide the supersampled side."""
    side = max(2 * max(sizes), 128)
    if any(size < 1 or side % size for size in sizes):
        raise ValueError(f"sizes {sizes} must be positive and divide {side}: choose powers of two times the smallest")
    backdrop, margin = _backdrop(clip, side)
    angle, period = clip.background.angle, clip.background.period * side
    painted: list[list[np.ndarray]] = [[] for _ in sizes]
    for index in range(frames):
        time = index / (CLIP_FRAMES - 1)
        shift = math.fmod(clip.drift * time, 1.0) * period
        left, top = margin + round(shift * math.cos(angle)), margin + round(shift * math.sin(angle))
        canvas = backdrop.crop((left, top, left + side, top + side))
        for actor in clip.actors:
            draw_thing(canvas, actor.at(time))
        if clip.fence is not None:
            draw_fence(canvas, clip.fence, clip.fence_period)
        for out, size in zip(painted, sizes, strict=True):
            out.append(np.asarray(canvas.reduce(side // size)))
    return [np.stack(out) for out in painted]
