"""Uploaded pictures, looked at before anything decodes them."""

from __future__ import annotations

import io
import struct
import warnings

from PIL import Image, ImageOps

from .errors import ApiError, invalid

FORMATS = ("PNG", "JPEG", "WEBP")
"""What is taken. Pillow's other readers are never asked."""


def read_picture(data: bytes, max_pixels: int, param: str) -> Image.Image:
    """Decodes an upload; the first frame of an animation, turned upright.

    Args:
        data: The file.
        max_pixels: Width times height that it may say it has.
        param: Name of the field, for messages.

    Returns:
        Of mode RGB or RGBA.

    Raises:
        ApiError: it is no whole PNG, JPEG or WebP, or too large.
    """
    if not data:
        raise invalid(param, f"{param} is empty: upload a PNG, JPEG or WebP.", "invalid_image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            message = f"{param} is {width}x{height}: at most {max_pixels} pixels are taken."
            raise ApiError(413, "image_too_large", message, param)
        image = ImageOps.exif_transpose(image)
        return image.convert("RGBA" if _is_clear(image) else "RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        message = f"{param} cannot be read ({type(error).__name__}): upload a whole PNG, JPEG or WebP."
        raise invalid(param, message, "invalid_image") from None


def _is_clear(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def fitted(image: Image.Image, size: tuple[int, int]) -> bytes:
    """The picture as an RGB PNG of ``size``, scaled; transparent parts become black."""
    flat = image
    if image.mode == "RGBA":
        flat = Image.new("RGB", image.size)
        flat.paste(image, mask=image.getchannel("A"))
    return _png(flat.resize(size, Image.Resampling.LANCZOS) if flat.size != size else flat)


def mask_of(image: Image.Image, size: tuple[int, int]) -> bytes:
    """Where to draw anew, white, as a grey PNG of ``size``.

    As OpenAI has it, fully transparent parts of an upload are those to draw; one without transparency says so in white.
    """
    if image.mode == "RGBA":
        grey = image.getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)
    else:
        grey = image.convert("L").point(lambda value: 255 if value >= 128 else 0)
    return _png(grey.resize(size, Image.Resampling.NEAREST) if grey.size != size else grey)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()
