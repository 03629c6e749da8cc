"""Painted scenes with what is where in them: what the reader learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddit_rt.evaluate.adherence import BACKGROUNDS, CELLS, COLOURS, RGB, SHAPES, SIDE, TEXTURES

from ..scenes import Scene, render
from ..shapes import covers

IGNORED = -1
"""A label that no loss is taken of."""

_SHAPES, _COLOURS = list(SHAPES), list(COLOURS)


@dataclass(frozen=True)
class Labelled:
    """A batch of scenes.

    Attributes:
        pictures: uint8 (B, 3, 128, 128).
        places: int64 (B, 3, 16, 16): shape (0 for none), colour and texture of what covers a cell's middle; -1 where
            there is no colour or texture to learn.
        wholes: int64 (B, 3): fence, kind of background, its colour (-1 for a gradient, which has two).
    """

    pictures: Tensor
    places: Tensor
    wholes: Tensor

    @staticmethod
    def joined(parts: Sequence[Labelled]) -> Labelled:
        """One batch of several."""
        return Labelled(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Labelled)))


def colour_name(colour: RGB) -> str:
    """The colour whose jittered form this is."""
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], colour))


def _places(scene: Scene) -> np.ndarray:
    out = np.array([[0], [IGNORED], [IGNORED]]) * np.ones((3, 1 + len(scene.things)), np.int64)
    for index, thing in enumerate(scene.things, start=1):
        # A zebra's colour is never said.
        colour = IGNORED if thing.shape == "zebra" else _COLOURS.index(colour_name(thing.colour))
        out[:, index] = 1 + _SHAPES.index(thing.shape), colour, TEXTURES.index(thing.texture)
    return out[:, covers(scene.things, 4 * CELLS)[2::4, 2::4]]


def _wholes(scene: Scene) -> tuple[int, int, int]:
    background = scene.background
    colour = IGNORED if background.kind == "gradient" else _COLOURS.index(background.colour_name)
    return int(scene.fence is not None), BACKGROUNDS.index(background.kind), colour


def label(scenes: list[Scene]) -> Labelled:
    """Paints scenes and says what is where."""
    pictures = torch.from_numpy(np.stack([render(scene, SIDE) for scene in scenes]))
    return Labelled(
        pictures.permute(0, 3, 1, 2),
        torch.from_numpy(np.stack([_places(scene) for scene in scenes])),
        torch.tensor([_wholes(scene) for scene in scenes]),
    )


def roughen(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures float32 (B, 3, H, W) in [0, 1], as a small diffusion model would paint them.

    Bent outlines, blur, full and coarse noise, other light.
    """
    batch, _, height, width = pictures.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)

    def noise(channels: int, side: int) -> Tensor:
        drawn = torch.randn(batch, channels, side, side, generator=generator)
        return (
            drawn
            if side == height == width
            else F.interpolate(drawn, (height, width), mode="bilinear", align_corners=False)
        )

    bend = (noise(2, 12) * uniform(0, 0.04)).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(batch, 2, 3), [batch, 3, height, width], align_corners=False)
    x = F.grid_sample(pictures, grid + bend, padding_mode="reflection", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(x, 3), (height, width), mode="bilinear", align_corners=False)
    x = torch.lerp(x, blurred, uniform(0, 1))
    x = x * uniform(0.9, 1.1) + uniform(-0.05, 0.05)
    return (x + noise(3, height) * uniform(0, 0.05) + noise(3, 24) * uniform(0, 0.06)).clamp(0, 1)
