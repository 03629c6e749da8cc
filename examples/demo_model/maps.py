"""What covers every place of a scene: targets for an auxiliary loss of the transformer's training.

A middle block is asked, through a small head that is thrown away, which shape covers each latent pixel and where in
that shape's own frame the pixel lies. Aligning a middle layer with a clean description of the picture speeds up
training several times over (REPA, arXiv 2410.06940); our painter knows that description exactly. Here it is what
gives the small model outlines within a CPU's training time.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ddit_rt.evaluate.adherence import SHAPES

from .scenes import Scene, caption, sample_scene
from .shapes import covers, draw_fence
from .sizes import Sizes

_SHAPES = list(SHAPES)
_FENCE = len(_SHAPES) + 1
CLASSES = len(_SHAPES) + 2
"""Background, every shape, fence."""
_COORDINATE_SCALE = 50


def scene_map(scene: Scene, sides: tuple[int, ...]) -> list[np.ndarray]:
    """Per side n, int8 (3, n, n): class, then x and y in the covering thing's frame times 50 (0 where none is)."""
    side = 4 * max(sides)
    owner = covers(scene.things, side)
    fence = np.zeros_like(owner)
    if scene.fence is not None:
        canvas = Image.new("RGB", (side, side))
        draw_fence(canvas, scene.fence, scene.fence_period)
        fence = np.asarray(canvas).max(axis=-1)
    maps = []
    for n in sides:
        at = (np.arange(n) * side + side // 2) // n
        rows, columns = np.meshgrid(at, at, indexing="ij")
        out = np.zeros((3, n, n), np.int8)
        for index, thing in enumerate(scene.things):
            own = owner[rows, columns] == index + 1
            dx = ((columns + 0.5) / side - thing.x) / thing.radius
            dy = ((rows + 0.5) / side - thing.y) / thing.radius
            cos, sin = math.cos(thing.angle), math.sin(thing.angle)
            out[0][own] = 1 + _SHAPES.index(thing.shape)
            out[1][own] = np.clip(_COORDINATE_SCALE * (dx * cos + dy * sin), -127, 127)[own]
            out[2][own] = np.clip(_COORDINATE_SCALE * (dy * cos - dx * sin), -127, 127)[own]
        fenced = fence[rows, columns] > 0
        out[:, fenced] = 0
        out[0][fenced] = _FENCE
        maps.append(out)
    return maps


def draw_maps(seed: int, index: int, sizes: Sizes) -> list[Tensor]:
    """The maps of one shard's scenes (`latents.draw_shard` drew them from the same seed), int8 (S, 3, n, n) each."""
    rng = Random(f"{seed} shard {index}")
    sides = tuple(resolution // 4 for resolution in sizes.resolutions)
    maps = []
    for _ in range(sizes.shard_scenes):
        scene = sample_scene(rng)
        maps.append(scene_map(scene, sides))
        for _ in range(sizes.captions):
            caption(scene, rng)  # Keeps the random numbers in step with `draw_shard`.
    return [torch.from_numpy(np.stack([scene[i] for scene in maps])) for i in range(len(sides))]


class MapReader(nn.Module):
    """Reads the map of the 2 x 2 latent pixels under each token from a block's hidden states (B, tokens, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 256)
        self.out = nn.Linear(256, 4 * (CLASSES + 2))

    def loss(self, hidden: Tensor, maps: Tensor) -> Tensor:
        """Cross-entropy of the class plus squared error of the coordinates where a shape covers; a scalar."""
        read = self.out(F.silu(self.hidden(self.norm(hidden)))).float().unflatten(-1, (4, CLASSES + 2))
        cells = maps.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)
        classes = cells[..., 0].long()
        covered = ((classes > 0) & (classes < _FENCE)).float()
        away = (read[..., CLASSES:] - cells[..., 1:].float() / _COORDINATE_SCALE).square().mean(-1)
        located = (away * covered).sum() / covered.sum().clamp_min(1)
        return F.cross_entropy(read[..., :CLASSES].flatten(0, 2), classes.flatten()) + located
