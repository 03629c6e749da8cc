"""Optical flow between the frames of a clip, by OpenCV's dense inverse search (DIS, Kroeger et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .unavailable import unavailable


@dataclass(frozen=True)
class Motion:
    """How the pixels of N frames move to N others.

    Attributes:
        there: (N, 2, H, W) float32, in pixels to the right and down: a pixel at x of the first is at x + there(x).
        back: The same from the second frames to the first.
        visible: (N, 1, H, W) bool: pixels of the first that are to be seen in the second.
    """

    there: Tensor
    back: Tensor
    visible: Tensor


def find_flow() -> Callable[[Tensor, Tensor], Motion]:
    """Loads the search for flow.

    Returns:
        (first, second), both (N, 3, H, W) float in [0, 1], at least 16 pixels a side -> :class:`Motion`.

    Raises:
        MetricUnavailableError: OpenCV is missing.
    """
    try:
        import cv2
    except ImportError as error:
        raise unavailable("optical flow", "opencv-python-headless", error, weights=False) from error
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(first: Any, second: Any) -> Tensor:
        found = [torch.from_numpy(search.calc(a, b, None)) for a, b in zip(first, second)]
        return torch.stack(found).movedim(-1, 1)

    def motion(first: Tensor, second: Tensor) -> Motion:
        one, other = _grey(first), _grey(second)
        there, back = flow(one, other), flow(other, one)
        return Motion(there, back, _visible(there, back))

    return motion


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Looks up (N, C, H, W) at every pixel's place plus ``flow`` (N, 2, H, W), bilinearly; borders go on outwards."""
    height, width = frames.shape[-2:]
    places = _places(height, width) + flow
    size = torch.tensor([width - 1, height - 1]).view(1, 2, 1, 1).clamp_min(1)
    grid = (2 * places / size - 1).movedim(1, -1)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True)


def _visible(there: Tensor, back: Tensor) -> Tensor:
    """Pixels that the two flows bring back to where they began, within the tolerance of Sundaram et al. (2010)."""
    height, width = there.shape[-2:]
    returned = warp(back, there)
    missed = (there + returned).square().sum(1, keepdim=True)
    length = there.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
    places = _places(height, width) + there
    limit = torch.tensor([width - 1, height - 1]).view(1, 2, 1, 1)
    inside = ((places >= 0) & (places <= limit)).all(1, keepdim=True)
    return inside & (missed < 0.01 * length + 0.5)


def _places(height: int, width: int) -> Tensor:
    """(1, 2, H, W): every pixel's column and row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows]).float()[None]


def _grey(frames: Tensor) -> Any:
    """(N, 3, H, W) in [0, 1] -> uint8 (N, H, W), luma of Rec. 601."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return ((frames * weights).sum(1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
