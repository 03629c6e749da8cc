"""Pictures and videos as files in memory."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from diffusers.utils import export_to_video
from PIL import Image


def picture_bytes(
    picture: np.ndarray, format: str, compression: int = 100, size: tuple[int, int] | None = None
) -> bytes:
    """An encoded picture.

    Args:
        picture: uint8 (H, W, 3).
        format: "png", "webp" or "jpeg".
        compression: Quality of webp and jpeg, 0 to 100; 100 of webp is lossless.
        size: Width and height to scale it to; None leaves it.
    """
    image = Image.fromarray(picture)
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if format == "png":
        image.save(out, "PNG", compress_level=1)
    elif format == "webp":
        image.save(out, "WEBP", quality=compression, lossless=compression == 100)
    else:
        image.save(out, "JPEG", quality=max(compression, 1))
    return out.getvalue()


def video_bytes(frames: np.ndarray, fps: int) -> bytes:
    """An MP4.

    Args:
        frames: uint8 (F, H, W, 3).
        fps: Frames per second.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        # a block of 1: the encoder would scale other sizes to multiples of 16
        export_to_video(list(frames / 255.0), str(path), fps=fps, macro_block_size=1)
        return path.read_bytes()


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as bytes, as diffusers rounds them."""
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def decoded(data: bytes) -> Image.Image:
    """A picture that :mod:`ddit_rt.serve.uploads` has encoded."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image
