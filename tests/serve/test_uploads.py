"""Uploads: whole pictures are taken, everything else is refused before it is decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddit_rt.serve.errors import ApiError
from ddit_rt.serve.uploads import fitted, mask_of, read_picture


def _bytes(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _noise(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    return Image.fromarray(pixels, mode)


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_taken(format: str) -> None:
    image = read_picture(_bytes(_noise(), format), 10**6, "image")
    assert image.size == (40, 30) and image.mode == "RGB"
    assert read_picture(_bytes(_noise(mode="RGBA")), 10**6, "image").mode == "RGBA"
    assert read_picture(_bytes(Image.new("L", (4, 4))), 10**6, "image").mode == "RGB"


def test_a_turned_photograph_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(_bytes(_noise(), "JPEG", exif=exif), 10**6, "image").size == (30, 40)


@pytest.mark.parametrize("width, height", [(40_000, 40_000), (2**31 - 1, 2**31 - 1), (2000, 2000)])
def test_bombs_are_refused_by_their_header(width: int, height: int) -> None:
    with pytest.raises(ApiError) as caught:
        read_picture(_bomb(width, height), 10**6, "image")
    assert caught.value.status in (400, 413) and caught.value.param == "image"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + b"\0" * 50,
        _bytes(_noise(), "BMP"),
        _bytes(_noise(), "TIFF"),
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        _bytes(_noise())[:200],
        _bytes(_noise(), "JPEG")[:100],
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_picture(data, 10**6, "image")
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")


@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_files_are_read_or_refused(noise: bytes, place: int, format: str) -> None:
    whole = bytearray(_bytes(_noise(), format))
    whole[place : place + len(noise)] = noise
    try:
        assert read_picture(bytes(whole), 10**6, "image").size[0] > 0
    except ApiError as error:
        assert error.status in (400, 413)


def test_pictures_and_masks_are_scaled() -> None:
    assert Image.open(io.BytesIO(fitted(_noise(), (64, 48)))).size == (64, 48)
    clear = _noise(mode="RGBA")
    clear.putalpha(255)
    clear.paste((0, 0, 0, 0), (0, 0, 20, 30))
    mask = Image.open(io.BytesIO(mask_of(clear, (40, 30))))
    assert mask.mode == "L"
    assert (np.asarray(mask)[:, :20] == 255).all() and (np.asarray(mask)[:, 20:] == 0).all()
    grey = Image.new("L", (4, 4), 0)
    grey.paste(255, (2, 0, 4, 4))
    white = np.asarray(Image.open(io.BytesIO(mask_of(grey.convert("RGB"), (4, 4)))))
    assert (white[:, 2:] == 255).all() and (white[:, :2] == 0).all()
