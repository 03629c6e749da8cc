"""Clips to look at: read back from files, scaled down, beside each other with their schedules, and as sheets of frames.

A clip here is uint8 (F, H, W, 3); a picture is a clip of one frame.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from ..schedule import COLOURS
from ..trajectories import save

Clip = NDArray[np.uint8]

_TITLE, _STRIP, _GAP = 14, 10, 4  # pixels: line of text, strip of steps, space between clips
_INK, _PAPER = (29, 39, 51), (255, 255, 255)


def to_clip(frames: torch.Tensor) -> Clip:
    """The first of (B, F, 3, H, W) or (B, 3, H, W) float in [0, 1] as a clip."""
    first = frames[0] if frames.ndim == 5 else frames[:1]
    return (first * 255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def read_clip(path: Path) -> Clip:
    """A picture file, a video file (needs imageio with ffmpeg) or a folder of frames, in the order of their names."""
    if path.is_dir():
        return np.stack([_pixels(file) for file in sorted(path.iterdir())])
    if path.suffix != ".mp4":
        return _pixels(path)[None]
    import imageio.v3 as iio

    return np.asarray(iio.imread(path))


def save_clip(clip: Clip, path: Path, fps: int) -> Path:
    """Writes a clip as .mp4 or .gif; see :func:`ddit_rt.trajectories.save`."""
    return save(torch.from_numpy(clip).movedim(-1, 1)[None] / 255, path, fps)


def webp(clip: Clip, fps: int, side: int | None = None, quality: int = 85) -> bytes:
    """A clip as a WebP file that repeats for ever.

    Args:
        clip: What to write.
        fps: Frames per second.
        side: Longest side in pixels, to scale down to; None leaves it.
        quality: 0 to 100.
    """
    frames = [Image.fromarray(frame) for frame in clip]
    for frame in frames:
        if side is not None:
            frame.thumbnail((side, side))
    stream = io.BytesIO()
    moving = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    frames[0].save(stream, "webp", quality=quality, **(moving if len(frames) > 1 else {}))
    return stream.getvalue()


def beside(clips: Mapping[str, Clip], schedules: Mapping[str, Sequence[int]], scale: int = 1) -> Clip:
    """Clips in one row, each under its title and over a strip of its patch sizes.

    Args:
        clips: Title -> clip, all of one shape.
        schedules: Title -> a multiple per denoising step, 0 for a skipped one; none for the plain pipeline.
        scale: How many pixels a side one pixel becomes.
    """
    count, height, width = next(iter(clips.values())).shape[:3]
    height, width = height * scale, width * scale
    page = Image.new("RGB", ((width + _GAP) * len(clips) - _GAP, _TITLE + height + _GAP + _STRIP), _PAPER)
    for number, title in enumerate(clips):
        left = number * (width + _GAP)
        _write(page, left, 0, title, width)
        _strip(page, schedules.get(title, ()), left, _TITLE + height + _GAP, width)
    found = np.repeat(np.asarray(page)[None], count, 0)
    for number, clip in enumerate(clips.values()):
        left = number * (width + _GAP)
        found[:, _TITLE : _TITLE + height, left : left + width] = clip.repeat(scale, 1).repeat(scale, 2)
    # the most common pixels of video have halves of colour: an odd side cannot be written
    return np.pad(found, ((0, 0), (0, found.shape[1] % 2), (0, found.shape[2] % 2), (0, 0)), mode="edge")


def contact_sheet(rows: Mapping[str, Clip], frames: int = 6) -> Image.Image:
    """Frames at even distances, the first and the last among them: a row per clip under its title.

    Args:
        rows: Title -> clip, all of one shape.
        frames: How many of each, all at most.
    """
    count, height, width = next(iter(rows.values())).shape[:3]
    chosen = sorted({round(place) for place in np.linspace(0, count - 1, min(frames, count))})
    across = (width + _GAP) * len(chosen) - _GAP
    page = Image.new("RGB", (across, (_TITLE + height + _GAP) * len(rows) - _GAP), _PAPER)
    for number, (title, clip) in enumerate(rows.items()):
        top = number * (_TITLE + height + _GAP)
        _write(page, 0, top, title, across)
        for column, index in enumerate(chosen):
            page.paste(Image.fromarray(clip[index]), (column * (width + _GAP), top + _TITLE))
    return page


def _write(page: Image.Image, left: int, top: int, text: str, width: int) -> None:
    """One line of text, cut where it would run on into the next column."""
    draw = ImageDraw.Draw(page)
    while text and draw.textlength(text) > width:
        text = text[:-1]
    draw.text((left, top), text, fill=_INK)


def _strip(page: Image.Image, schedule: Sequence[int], left: int, top: int, width: int) -> None:
    draw = ImageDraw.Draw(page)
    edges = [left + round(width * i / len(schedule)) for i in range(len(schedule) + 1)] if schedule else []
    for multiple, begin, end in zip(schedule, edges, edges[1:]):
        draw.rectangle((begin, top, max(begin, end - 2), top + _STRIP - 1), fill=ImageColor.getrgb(COLOURS[multiple]))


def _pixels(path: Path) -> Clip:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
