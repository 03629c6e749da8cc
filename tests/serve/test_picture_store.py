"""Pictures that are kept for some time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ddit_rt.serve.picture_store import PictureStore


def test_what_is_past_its_time_goes_and_what_a_killed_server_left(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, 60)
    names = [store.add(b"data", "png") for _ in range(2)]
    for name in (".part-0123", ".part-4567", "notes"):
        (tmp_path / name).write_bytes(b"half")
    for name in (names[0], ".part-0123", "notes"):
        os.utime(tmp_path / name, (0, time.time() - 61))
    store.expire()
    assert {path.name for path in tmp_path.iterdir()} == {names[1], ".part-4567", "notes"}
    assert store.find(names[0]) is None and store.find(names[1]) is not None


def test_a_file_that_goes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PictureStore(tmp_path, 60)
    old = tmp_path / store.add(b"data", "png")
    os.utime(old, (0, 0))
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / "img_gone.png", *glob(self, pattern)])
    store.expire()
    assert not old.exists()
