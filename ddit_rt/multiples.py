"""Patch sizes as multiples of the model's own, as schedules and reports count them.

1 is the model's own patch, 2 and 4 are patches of twice and four times its side; 0 is a step without a model call. In a
video a patch may also span two latent frames: (frames, side) is then written 10·frames + side, 21 for two frames at the
model's own side and 22 for two at twice its side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SKIP = 0
"""In a schedule, a step that makes no model call."""
SUPPORTED_MULTIPLES = (1, 2, 4)
"""Sizes in space."""
TEMPORAL_MULTIPLES = (21, 22)
"""Sizes that span two latent frames, which some video models can work with."""
ALL_MULTIPLES = (*SUPPORTED_MULTIPLES, *TEMPORAL_MULTIPLES)


def side_of(multiple: int) -> int:
    """How many of the model's patches lie along a side."""
    return multiple % 10


def frames_of(multiple: int) -> int:
    """How many latent frames a patch spans."""
    return max(multiple // 10, 1)


def volume(multiple: int) -> int:
    """How many latent values of a channel become one in the mean: k² in space, 2·k² over two frames."""
    return frames_of(multiple) * side_of(multiple) ** 2


def noise_shrink(multiple: int) -> float:
    """By how much the mean over a patch's values divides the standard deviation of noise: k in space."""
    return side_of(multiple) * math.sqrt(frames_of(multiple))


def label(multiple: int) -> str:
    """What people read: "skipped", "p", "2p", "4p"; "p x 2 frames" and "2p x 2 frames"."""
    if multiple == SKIP:
        return "skipped"
    side = f"{side_of(multiple)}p" if side_of(multiple) > 1 else "p"
    return side if multiple in SUPPORTED_MULTIPLES else f"{side} x {frames_of(multiple)} frames"


def short_label(multiple: int) -> str:
    """:func:`label` for narrow columns, "2f" and "2f2p" where a patch spans two frames."""
    if multiple < 10:
        return label(multiple)
    side = f"{side_of(multiple)}p" if side_of(multiple) > 1 else ""
    return f"{frames_of(multiple)}f{side}"


def read_multiple(value: Any) -> Any:
    """A pair (frames, side) as a multiple; anything else as it is."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        frames, side = value
        if frames == 1:
            return side
        return next((k for k in TEMPORAL_MULTIPLES if (frames_of(k), side_of(k)) == (frames, side)), value)
    return value
