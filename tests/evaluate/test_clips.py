"""Clips to look at: what is beside what, and what comes back from files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from ddit_rt.evaluate.clips import beside, contact_sheet, read_clip, save_clip, to_clip, webp
from ddit_rt.schedule import COLOURS


def clip(value: int, frames: int = 9, height: int = 32, width: int = 48, brighter: int = 1) -> np.ndarray:
    """Every frame in one grey, each brighter than the one before."""
    greys = (value + brighter * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (frames, height, width, 3)).copy()


def test_clips_stand_beside_each_other_over_their_strips():
    clips = {"plain": clip(10), "fast": clip(100)}
    found = beside(clips, {"fast": [1, 2, 0, 4]})
    assert found.shape == (9, 14 + 32 + 4 + 10, 48 + 4 + 48, 3) and found.dtype == np.uint8
    for index in (0, 8):
        assert (found[index, 14:46, :48] == 10 + index).all() and (found[index, 14:46, 52:] == 100 + index).all()
    strip = found[0, -5, 52:]
    assert [tuple(strip[6 + 12 * step]) for step in range(4)] == [ImageColor.getrgb(COLOURS[k]) for k in (1, 2, 0, 4)]
    assert (found[0, -10:, :48] == 255).all(), "the plain pipeline has no strip"
    assert (found[:, :14].min(axis=(1, 2, 3)) < 100).all(), "titles are written"
    larger = beside(clips, {}, scale=3)
    assert larger.shape[1:3] == (14 + 96 + 4 + 10, 144 + 4 + 144) and (larger[4, 14:110, :144] == 14).all()


def test_a_sheet_has_the_first_and_the_last_frame():
    sheet = np.asarray(contact_sheet({"plain": clip(10), "fast": clip(100)}, frames=3))
    assert sheet.shape == (2 * (14 + 32) + 4, 3 * 48 + 2 * 4, 3)
    assert [int(sheet[20, 52 * column + 5, 0]) for column in range(3)] == [10, 14, 18]
    assert [int(sheet[14 + 32 + 4 + 14 + 5, 52 * column + 5, 0]) for column in range(3)] == [100, 104, 108]
    assert contact_sheet({"short": clip(1, frames=2)}, frames=6).width == 2 * 48 + 4


def test_what_was_written_is_read_again(tmp_path):
    frames = torch.rand(1, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    own = to_clip(frames)
    assert own.shape == (5, 16, 24, 3) and to_clip(frames[:, 0]).shape == (1, 16, 24, 3)
    (tmp_path / "frames").mkdir()
    for index, picture in enumerate(own):
        Image.fromarray(picture).save(tmp_path / "frames" / f"{index:04d}.png")
    assert np.array_equal(read_clip(tmp_path / "frames"), own)
    assert np.array_equal(read_clip(tmp_path / "frames" / "0003.png"), own[3:4])
    grey = clip(50, height=24, width=40)
    again = read_clip(save_clip(grey, tmp_path / "a.mp4", 8))
    assert again.shape == grey.shape and abs(again.astype(int) - grey).max() < 8


def test_a_moving_thumbnail_has_all_frames_and_its_pace():
    thumbnail = Image.open(io.BytesIO(webp(clip(50, brighter=20), 8, side=24)))
    assert thumbnail.size == (24, 16) and thumbnail.n_frames == 9
    thumbnail.load()
    assert thumbnail.info["duration"] == pytest.approx(125)
    still = Image.open(io.BytesIO(webp(clip(50, frames=1), 8)))
    assert still.size == (48, 32) and getattr(still, "n_frames", 1) == 1
