"""What the demo model's captions can say: the words that prompt adherence looks for, and the scenes are drawn from."""

from __future__ import annotations

RGB = tuple[int, int, int]
"""A colour, 0 to 255."""

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 40),
    "green": (40, 165, 70),
    "blue": (45, 90, 220),
    "purple": (135, 60, 180),
    "pink": (250, 140, 190),
    "white": (245, 245, 245),
    "black": (18, 18, 22),
}

# singular -> plural
SHAPES: dict[str, str] = {
    "ball": "balls",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "ring": "rings",
    "heart": "hearts",
    "apple": "apples",
    "house": "houses",
    "tree": "trees",
    "fish": "fishes",
    "zebra": "zebras",
}

TEXTURES = ("plain", "striped", "checked", "dotted")

BACKGROUNDS = ("plain", "gradient", "striped", "checked")

MANY_WORDS = ("many", "several", "some")
