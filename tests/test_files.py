"""Outputs that are tried before the work that they are for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ddit_rt import ConfigError
from ddit_rt.files import check_output


def test_what_can_be_written_passes_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").write_text("old")
    for path in (Path("a.png"), Path("new/deep/a.png"), Path("old.png"), tmp_path / "new" / "a.png"):
        check_output(path)
    for folder in (Path("new/deep"), Path("."), tmp_path):
        check_output(folder, folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and Path("old.png").read_text() == "old"


def test_what_is_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").write_text("")
    Path("dir.png").mkdir()
    for path, told in (
        ("dir.png", r"output='dir\.png' is a folder, a file is wanted"),
        ("afile/x.png", r"output='afile/x\.png': afile is a file, a folder is wanted"),
        ("afile/new/x.png", "afile is a file, a folder is wanted"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_output(Path(path))
    for path in ("afile", "afile/new"):
        with pytest.raises(ConfigError, match=f"output='{path}': afile is a file, a folder is wanted"):
            check_output(Path(path), folder=True)


def test_what_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everything, so it is said
    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ConfigError, match=r"a\.png' is there and cannot be written to"):
        check_output(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"cannot be written into \(Permission denied\)"):
        check_output(tmp_path / "b.png")
