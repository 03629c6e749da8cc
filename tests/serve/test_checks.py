"""A request against what the model and the encoders take."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddit_rt.serve import Limits
from ddit_rt.serve.checks import LONGEST_SIDES, works_of
from ddit_rt.serve.encode import picture_bytes
from ddit_rt.serve.errors import ApiError
from ddit_rt.serve.wire import ImageRequest, VideoRequest, quality_of
from ddit_rt.serve.work import ModelFacts

FACTS: dict[str, Any] = {
    "name": "it",
    "sizes": ("64x64",),
    "side": 4,
    "frame_step": 4,
    "steps": 8,
    "guidance": None,
    "frames": 5,
    "fps": 16,
    "negative": True,
    "speedup": 2.0,
    "loras": (),
    "edits": False,
    "inpaints": False,
    "prompts": (),
    "created": 0,
}


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_the_longest_sides_are_those_of_the_encoders(format: str) -> None:
    longest = LONGEST_SIDES[format]
    data = picture_bytes(np.zeros((1, longest, 3), np.uint8), format)
    assert Image.open(io.BytesIO(data)).size == (longest, 1)
    with pytest.raises((ValueError, OSError)):
        picture_bytes(np.zeros((1, longest + 1, 3), np.uint8), format)


@pytest.mark.parametrize(
    "format, size, taken",
    [
        ("webp", "16380x4", True),
        ("webp", "16384x4", False),
        ("webp", "4x16384", False),
        ("jpeg", "65500x4", True),
        ("jpeg", "65504x4", False),
        ("png", "65504x4", True),
        ("mp4", "16380x4", True),
        ("mp4", "16384x4", False),  # whose thumbnail is a webp
    ],
)
def test_a_format_that_holds_no_such_side_is_refused(format: str, size: str, taken: bool) -> None:
    fields: dict[str, Any] = {"prompt": "x", "size": size}
    if format == "mp4":
        request: Any = VideoRequest(**fields)
        facts = ModelFacts(kind="video", **FACTS)
    else:
        request = ImageRequest(output_format=format, **fields)
        facts = ModelFacts(kind="image", **FACTS)
    if taken:
        assert works_of(request, facts, Limits(), "req", "")[0].format == format
        return
    with pytest.raises(ApiError, match="sides of at most") as caught:
        works_of(request, facts, Limits(), "req", "")
    assert (caught.value.status, caught.value.param) == (400, "size")


def test_what_a_request_aims_at_reaches_the_run() -> None:
    request = ImageRequest(prompt="x", speedup=3, reference="plain", toward_converged=0.3)
    (work,) = works_of(request, ModelFacts(kind="image", **FACTS), Limits(), "req", "")
    assert dict(work.settings) == {"speedup": 3, "reference": "plain", "toward_converged": 0.3}


@pytest.mark.parametrize(
    "fields, speedup, word",
    [
        ({"quality": "low"}, 3.5, "low"),  # as near as the steps allow
        ({"quality": "hd"}, 1.8, "high"),
        ({"quality": "low", "speedup": 1}, 1.0, "max"),
        ({"quality": "low", "quality_db": 40}, 2.2, "high"),
        ({"quality": "max", "schedule": [1, 0, 0, 0]}, 4.0, "low"),
        ({"quality": "auto"}, 3.0, "medium"),
    ],
)
def test_the_quality_that_is_told_is_that_of_the_run(fields: dict[str, Any], speedup: float, word: str) -> None:
    assert quality_of(ImageRequest(prompt="x", **fields), speedup) == word
