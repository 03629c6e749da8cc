"""How the scenes' shapes, textures and fence are painted with PIL (aliased: the caller supersamples)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ddit_rt.evaluate.adherence import RGB

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Thing:
    """One painted object; `x`, `y` and `radius` are fractions of the side, angles in radians."""

    shape: str
    colour: RGB
    texture: str
    second: RGB
    x: float
    y: float
    radius: float
    angle: float
    pattern_angle: float
    pattern_period: float


def _regular(count: int, inner: float = 1.0) -> Points:
    """A regular polygon, or a star where `inner` < 1 pulls in every second corner; first corner up."""
    corners = count if inner == 1.0 else 2 * count
    return [
        (
            (inner if i % 2 and inner < 1 else 1.0) * math.sin(2 * math.pi * i / corners),
            -(inner if i % 2 and inner < 1 else 1.0) * math.cos(2 * math.pi * i / corners),
        )
        for i in range(corners)
    ]


def _ellipse(x: float, y: float, rx: float, ry: float, corners: int = 40) -> Points:
    return [
        (x + rx * math.cos(2 * math.pi * i / corners), y + ry * math.sin(2 * math.pi * i / corners))
        for i in range(corners)
    ]


def _heart() -> Points:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


# Body outlines in a frame where the object fills about [-1, 1]; y points down.
_BODIES: dict[str, list[Points]] = {
    "ball": [_ellipse(0, 0, 0.95, 0.95, 64)],
    "square": [[(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]],
    "triangle": [[(0, -0.98), (0.95, 0.75), (-0.95, 0.75)]],
    "star": [_regular(5, 0.45)],
    "ring": [_ellipse(0, 0, 0.95, 0.95, 64)],
    "heart": [_heart()],
    "apple": [_ellipse(-0.36, 0.12, 0.56, 0.7), _ellipse(0.36, 0.12, 0.56, 0.7), _ellipse(0, 0.45, 0.5, 0.42)],
    "house": [[(-0.75, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9)]],
    "tree": [[(0, -1), (0.6, -0.2), (-0.6, -0.2)], [(0, -0.6), (0.82, 0.5), (-0.82, 0.5)]],
    "fish": [_ellipse(-0.18, 0, 0.78, 0.52), [(0.4, 0), (1.0, -0.52), (1.0, 0.52)]],
    "zebra": [
        _ellipse(0.1, 0.0, 0.66, 0.36),
        [(-0.62, -0.95), (-0.36, -0.95), (-0.05, -0.2), (-0.5, 0.05)],
        _ellipse(-0.72, -0.72, 0.28, 0.19),
        [(-0.42, 0.1), (-0.2, 0.1), (-0.22, 0.95), (-0.4, 0.95)],
        [(-0.12, 0.2), (0.08, 0.2), (0.04, 0.95), (-0.12, 0.95)],
        [(0.26, 0.2), (0.44, 0.2), (0.42, 0.95), (0.26, 0.95)],
        [(0.5, 0.1), (0.73, 0.1), (0.7, 0.95), (0.52, 0.95)],
        [(0.66, -0.2), (0.78, -0.26), (0.98, 0.4), (0.88, 0.42)],
    ],
}
_HOLES: dict[str, list[Points]] = {"ring": [_ellipse(0, 0, 0.48, 0.48, 48)]}
_TRUNK: Points = [(-0.16, 0.4), (0.16, 0.4), (0.16, 0.98), (-0.16, 0.98)]
_BROWN = (105, 65, 35)


def _details(thing: Thing) -> list[tuple[Points, RGB]]:
    """Parts painted over the body, with their colours: stalk and leaf, roof and door, eye, nose."""
    red, green, blue = thing.colour
    dark = (round(red * 0.55), round(green * 0.55), round(blue * 0.55))
    if max(dark) < 40:
        dark = (90, 90, 95)
    if thing.shape == "apple":
        return [
            ([(-0.05, -0.45), (0.02, -0.95), (0.14, -0.95), (0.06, -0.45)], _BROWN),
            (_ellipse(0.38, -0.78, 0.28, 0.13), (70, 160, 60)),
        ]
    if thing.shape == "house":
        return [
            ([(-0.98, -0.05), (0, -0.98), (0.98, -0.05)], dark),
            ([(-0.2, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.2, 0.9)], dark),
        ]
    if thing.shape == "fish":
        white, black = (250, 250, 250), (10, 10, 10)
        return [(_ellipse(-0.58, -0.12, 0.14, 0.14), white), (_ellipse(-0.6, -0.12, 0.07, 0.07), black)]
    if thing.shape == "zebra":
        return [(_ellipse(-0.95, -0.68, 0.09, 0.1), (25, 25, 25)), (_ellipse(-0.68, -0.78, 0.05, 0.05), (10, 10, 10))]
    return []


def draw_pattern(draw: ImageDraw.ImageDraw, kind: str, colour: RGB, side: float, period: float, angle: float) -> None:
    """Paint the second colour of a pattern over a `side` x `side` area; lengths in pixels, `angle` in radians."""
    steps = math.ceil(side / period) + 2
    if kind == "striped":
        cos, sin = math.cos(angle), math.sin(angle)
        reach, middle = 1.5 * side, side / 2
        for i in range(-steps, steps + 1):
            x, y = middle + i * period * cos, middle + i * period * sin
            ends = [(x - reach * sin, y + reach * cos), (x + reach * sin, y - reach * cos)]
            draw.line(ends, fill=colour, width=round(period * 0.5))
    elif kind == "checked":
        half = period / 2
        for row in range(2 * steps):
            for column in range(row % 2, 2 * steps, 2):
                x, y = column * half, row * half
                draw.rectangle((round(x), round(y), round(x + half) - 1, round(y + half) - 1), fill=colour)
    elif kind == "dotted":
        radius = period * 0.27
        for row in range(steps + 1):
            for column in range(-1, steps + 1):
                x, y = (column + 0.5 * (row % 2) + 0.25) * period, (row + 0.25) * period * 0.87
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind != "plain":
        raise ValueError(f"unknown pattern {kind!r}: use plain, striped, checked or dotted")


@dataclass(frozen=True)
class _Frame:
    """The square of pixels that a thing is painted in, and how its own frame lies there."""

    thing: Thing
    left: int
    top: int
    extent: int
    radius: float

    @staticmethod
    def of(thing: Thing, side: int) -> _Frame:
        radius = thing.radius * side
        left, top = round(thing.x * side - 1.15 * radius), round(thing.y * side - 1.15 * radius)
        return _Frame(thing, left, top, round(2.3 * radius), radius)

    def place(self, points: Points) -> Points:
        """From the thing's frame to pixels from the square's corner."""
        cos, sin, middle = math.cos(self.thing.angle), math.sin(self.thing.angle), self.extent / 2
        return [
            (middle + self.radius * (x * cos - y * sin), middle + self.radius * (x * sin + y * cos)) for x, y in points
        ]

    def on_canvas(self, points: Points) -> Points:
        return [(x + self.left, y + self.top) for x, y in self.place(points)]

    def mask(self) -> Image.Image:
        """The body with its holes: 255 inside, 0 outside."""
        mask = Image.new("L", (self.extent, self.extent), 0)
        draw = ImageDraw.Draw(mask)
        for body in _BODIES[self.thing.shape]:
            draw.polygon(self.place(body), fill=255)
        for hole in _HOLES.get(self.thing.shape, []):
            draw.polygon(self.place(hole), fill=0)
        return mask


def _cover_thing(canvas: Image.Image, thing: Thing, value: int) -> None:
    """Fill everything that `draw_thing` paints with one grey `value` of a square "L" canvas."""
    frame = _Frame.of(thing, canvas.size[0])
    canvas.paste(value, (frame.left, frame.top), frame.mask())
    draw = ImageDraw.Draw(canvas)
    parts = [points for points, _ in _details(thing)] + ([_TRUNK] if thing.shape == "tree" else [])
    for points in parts:
        draw.polygon(frame.on_canvas(points), fill=value)


def covers(things: Sequence[Thing], side: int) -> np.ndarray:
    """Which thing is seen at each pixel: uint8 (side, side), 1 for the first of `things`, 0 where none is."""
    canvas = Image.new("L", (side, side), 0)
    for number, thing in enumerate(things, start=1):
        _cover_thing(canvas, thing, number)
    return np.asarray(canvas)


def draw_thing(canvas: Image.Image, thing: Thing) -> None:
    """Paint one thing onto a square RGB canvas."""
    side = canvas.size[0]
    frame = _Frame.of(thing, side)
    draw = ImageDraw.Draw(canvas)
    if thing.shape == "tree":
        draw.polygon(frame.on_canvas(_TRUNK), fill=_BROWN)
    colour, second = thing.colour, thing.second
    period, angle = thing.pattern_period * side, thing.pattern_angle
    if thing.shape == "zebra":
        colour, second = (245, 245, 245), (20, 20, 22)
        period, angle = 0.3 * frame.radius, 0.25
    layer = Image.new("RGB", (frame.extent, frame.extent), colour)
    draw_pattern(ImageDraw.Draw(layer), thing.texture, second, frame.extent, period, angle)
    canvas.paste(layer, (frame.left, frame.top), frame.mask())
    for points, fill in _details(thing):
        draw.polygon(frame.on_canvas(points), fill=fill)


def draw_fence(canvas: Image.Image, colour: RGB, period: float) -> None:
    """Paint two rails and upright pickets across the whole canvas; `period` is a fraction of its side."""
    side = canvas.size[0]
    draw = ImageDraw.Draw(canvas)
    shade = (round(colour[0] * 0.8), round(colour[1] * 0.8), round(colour[2] * 0.8))
    for y in (0.5, 0.8):
        draw.rectangle((0, round(y * side), side, round((y + 0.055) * side)), fill=shade)
    width, top = 0.34 * period * side, 0.36 * side
    x = 0.3 * period * side
    while x < side:
        draw.polygon(
            [(x, side), (x, top + width / 2), (x + width / 2, top), (x + width, top + width / 2), (x + width, side)],
            fill=colour,
        )
        x += period * side
