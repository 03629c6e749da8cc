"""A folder of pictures: what is read, what is missing, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddit_rt import ConfigError, FittedSchedule
from ddit_rt.trajectories import MANIFEST, Item, PictureFolder, read_items

RUN = {"model": "demo", "call": {"num_inference_steps": 8}}
FRAMES = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_line_is_a_prompt_and_its_number_gives_seed_and_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\n  Zürich, at night!  \n" + "long " * 40, encoding="utf-8")
    items = read_items(path, 7)
    assert [(item.line, item.seed) for item in items] == [(1, 7), (3, 9), (4, 10)]
    assert items[1].prompt == "Zürich, at night!" and items[1].name == "00003-zürich-at-night"
    assert len(items[2].name) < 60 and not items[2].name.endswith("-")
    assert Item(5, "!?", 0).name == "00005"


def test_lines_of_json_may_have_seeds_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a star", "seed": 40}\n{"prompt": "a ring"}\n', encoding="utf-8")
    assert read_items(path, 7) == [Item(1, "a star", 40), Item(2, "a ring", 8)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a star", "line 2 is no JSON"),
        ('{"seed": 3}', "line 2.*has no prompt"),
        ('{"prompt": "a star", "size": 3}', "line 2: 'size' is not understood"),
        ('{"prompt": "a star", "seed": -1}', "line 2: seed=-1 is no whole number"),
        (f'{{"prompt": "a star", "seed": {2**63}}}', f"line 2: seed={2**63} is no whole number from 0 to {2**63 - 1}"),
    ],
)
def test_a_line_that_is_not_understood_is_named(line: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a ring"}}\n{line}\n')
    with pytest.raises(ConfigError, match=told):
        read_items(path, 0)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_items(tmp_path / "missing.txt", 0)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="no prompt found"):
        read_items(tmp_path / "empty.txt", 0)


def test_a_picture_is_there_once_its_record_is(tmp_path: Path) -> None:
    items = [Item(1, "a star", 0), Item(2, "a ring", 1), Item(3, "a heart", 2)]
    folder = PictureFolder(tmp_path / "out", RUN)
    assert folder.missing(items) == items
    path = folder.add(items[0], FRAMES, ".png", 16, {"speedup": 2.0})
    folder.fail(items[1], ValueError("too dark"))
    (folder.folder / ".parts" / "00003-a-heart.png").write_bytes(b"half")
    again = PictureFolder(tmp_path / "out", RUN)
    again.clear()
    assert again.missing(items) == items[1:] and not list((folder.folder / ".parts").iterdir())
    again.finish(items)
    lines = (folder.folder / MANIFEST).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"line": 1, "prompt": "a star", "seed": 0, "file": path.name, "speedup": 2.0},
        {"line": 2, "prompt": "a ring", "seed": 1, "error": "ValueError: too dark"},
    ]
    path.unlink()
    assert again.missing(items) == items


def test_a_folder_holds_pictures_of_one_kind(tmp_path: Path) -> None:
    schedule = FittedSchedule([1, 0, 1], 1.5, 30.0, 1)
    folder = PictureFolder(tmp_path, {**RUN, "schedule": schedule})
    folder.add(Item(1, "a star", 0), FRAMES, ".png", 16, {})
    PictureFolder(tmp_path, {**RUN, "schedule": FittedSchedule([1, 0, 1], 1.5, 30.0, 1)})
    with pytest.raises(ConfigError, match="made with model='demo', and now it is 'other'"):
        PictureFolder(tmp_path, {**RUN, "schedule": schedule, "model": "other"})
    with pytest.raises(ConfigError, match="line 1 with prompt='a star', and now it is 'a ring'"):
        folder.missing([Item(1, "a ring", 0)])
    with pytest.raises(ConfigError, match="line 1 with seed=0, and now it is 5"):
        folder.missing([Item(1, "a star", 5)])
