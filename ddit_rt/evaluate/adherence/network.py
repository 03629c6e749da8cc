"""The reader: a small convolutional network that says what covers each place of a picture, and how that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from .statements import Statement
from .vocabulary import BACKGROUNDS, COLOURS, SHAPES, TEXTURES

WEIGHTS = Path(__file__).parent / "reader.safetensors"
SIDE, CELLS = 128, 16
"""Pixels a side that the reader looks at, and cells a side that it answers for."""
AREA = 0.42
"""A shape is there if it has this share of some 2 x 2 cells: as many true statements are missed as false ones found."""
SHARE = 0.3
"""A colour or texture is a shape's if it has this share of the shape's cells; below a half, since a picture may hold
two things of one shape."""

_SHAPES, _COLOURS = list(SHAPES), list(COLOURS)
_PLACES = {"shape": len(_SHAPES) + 1, "colour": len(_COLOURS), "texture": len(TEXTURES)}
_WHOLES = {"fence": 1, "kind": len(BACKGROUNDS), "background": len(_COLOURS)}


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_layer(width, width, 1, dilation), *_layer(width, width, 1, dilation)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def _layer(before: int, after: int, stride: int, dilation: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(before, after, 3, stride, dilation, dilation, bias=False)
    return convolution, nn.BatchNorm2d(after), nn.ReLU()


class ReaderNet(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] -> logits by name.

    "shape" (B, 12, 16, 16), nothing first; "colour" (B, 9, 16, 16); "texture" (B, 4, 16, 16); "fence" (B, 1);
    "kind" (B, 4) and "background" (B, 9) of the background and its colour.
    """

    def __init__(self, channels: Sequence[int] = (24, 48, 72)) -> None:
        super().__init__()
        first, second, width = channels
        self.stem = nn.Sequential(*_layer(3, first, 2), *_layer(first, second, 2), _Block(second, 1))
        # Dilated, so that every cell sees the whole of a large shape.
        blocks = [_Block(width, dilation) for dilation in (1, 2, 4)]
        self.trunk = nn.Sequential(*_layer(second, width, 2), *blocks)
        self.places = nn.Conv2d(width, sum(_PLACES.values()), 1)
        self.wholes = nn.Linear(3 * width, sum(_WHOLES.values()))

    def features(self, pictures: Tensor) -> Tensor:
        """What the answers are read from: (B, 3, 128, 128) in [0, 1] -> (B, d, 16, 16), none below 0."""
        features: Tensor = self.trunk(self.stem(pictures - 0.5))
        return features

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        places = dict(zip(_PLACES, self.places(features).split(list(_PLACES.values()), dim=1)))
        free = places["shape"].detach().softmax(1)[:, :1]
        behind = (features * free).sum((2, 3)) / free.sum((2, 3)).clamp_min(1e-3)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3)), behind], dim=1)
        return places | dict(zip(_WHOLES, self.wholes(pooled).split(list(_WHOLES.values()), dim=1)))


@dataclass(frozen=True)
class Reading:
    """What the reader found in one picture.

    Attributes:
        areas: (11,) the largest share of 2 x 2 cells that each shape has.
        colours: (11, 9) of each shape's cells, the share in each colour.
        textures: (11, 4) the same for textures.
        fence: Probability.
        kinds, backgrounds: (4,) and (9,), probabilities of the background's kind and colour.
    """

    areas: Tensor
    colours: Tensor
    textures: Tensor
    fence: float
    kinds: Tensor
    backgrounds: Tensor

    def finds(self, statement: Statement) -> bool:
        """Whether the picture shows what is stated; a colour or texture only of a shape that is there."""
        value = statement.value
        match statement.field:
            case "shape":
                return self._shows(value)
            case "colour":
                share = self.colours[_SHAPES.index(statement.shape), _COLOURS.index(value)]
                return self._shows(statement.shape) and bool(share >= SHARE)
            case "texture":
                share = self.textures[_SHAPES.index(statement.shape), TEXTURES.index(value)]
                return self._shows(statement.shape) and bool(share >= SHARE)
            case "fence":
                return self.fence >= 0.5
            case "background kind":
                return int(self.kinds.argmax()) == BACKGROUNDS.index(value)
            case "background colour":
                return int(self.backgrounds.argmax()) == _COLOURS.index(value)
            case field:
                raise ValueError(f"field={field!r}: no field of statements")

    def _shows(self, shape: str) -> bool:
        return bool(self.areas[_SHAPES.index(shape)] >= AREA)

    def share(self, statements: Sequence[Statement]) -> float:
        """The share of these statements that it finds, 0 to 1."""
        return sum(map(self.finds, statements)) / len(statements)


@cache
def load_reader() -> ReaderNet:
    """The shipped reader, on the CPU in float32, in evaluation mode; loaded once."""
    net = ReaderNet()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False)


def to_pictures(images: Sequence[np.ndarray | Image.Image]) -> Tensor:
    """Pictures of any sizes, uint8 (H, W, 3), as the reader takes them: float32 (N, 3, 128, 128) in [0, 1]."""
    resized = []
    for image in images:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture = picture.convert("RGB")
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
        resized.append(torch.from_numpy(np.array(picture)))
    return torch.stack(resized).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def read(pictures: Tensor, net: ReaderNet | None = None) -> list[Reading]:
    """One reading per picture.

    Args:
        pictures: float32 (N, 3, 128, 128) in [0, 1].
        net: In evaluation mode; None takes the shipped reader.
    """
    logits = (net or load_reader())(pictures)
    shapes = logits["shape"].softmax(1)[:, 1:]
    areas = F.avg_pool2d(shapes, 2, 1).amax((2, 3))
    weights = shapes.flatten(2) / shapes.sum((2, 3)).clamp_min(1e-6)[..., None]
    colours, textures = (weights @ logits[n].softmax(1).flatten(2).mT for n in ("colour", "texture"))
    fences = logits["fence"].sigmoid()[:, 0].tolist()
    kinds, backgrounds = logits["kind"].softmax(1), logits["background"].softmax(1)
    return [Reading(*values) for values in zip(areas, colours, textures, fences, kinds, backgrounds)]
