"""Prompts from files of every kind."""

import json

import pytest

from ddit_rt import ConfigError
from ddit_rt.evaluate import prompts as module
from ddit_rt.evaluate.prompts import load_prompts, own_prompts


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", "one\n\n two \n"),
        ("a.csv", "id,Prompt\n1,one\n2,two\n"),
        ("a.tsv", "Prompt\tCategory\none\tx\ntwo\ty\n"),
        ("a.json", json.dumps(["one", "two"])),
        ("a.jsonl", '{"caption": "one"}\n{"caption": "two"}\n'),
        ("mixed.json", json.dumps(["one", {"text": "two"}])),
        ("marked.jsonl", '\ufeff{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("coco.json", json.dumps({"annotations": [{"caption": "one"}, {"caption": "two"}]})),
    ],
)
def test_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert load_prompts(str(path)) == ["one", "two"]
    assert load_prompts(str(path), 1) == ["one"]


def test_demo_prompts_are_many_different_and_always_the_same():
    prompts = own_prompts("demo", 64)
    assert len(set(prompts)) == 64 and prompts == own_prompts("demo") and prompts[:8] == own_prompts("demo", 8)
    assert load_prompts("demo", 5) == prompts[:5]


def test_a_model_whose_captions_are_not_here_asks_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(module.OWN, "demo-video", tmp_path / "demo_video_prompts.txt")
    with pytest.raises(ConfigError, match=r"no demo_video_prompts\.txt; give a file"):
        load_prompts("demo-video", 2)
    (tmp_path / "demo_video_prompts.txt").write_text("a ball rolls\na star turns\n")
    prompts = ["a ball rolls", "a star turns"]
    assert load_prompts("demo-video") == prompts and len(load_prompts("demo-video", 1)) == 1
    with pytest.raises(ConfigError, match="count=3: there are 2 demo-video prompts"):
        load_prompts("demo-video", 3)
    assert load_prompts("demo-video", 3, required=1) == load_prompts("demo-video", 3, required=2) == prompts
    with pytest.raises(ConfigError, match="count=3: there are 2 demo-video prompts"):
        load_prompts("demo-video", 9, required=3)


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="no prompt found"):
        load_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no prompt column"):
        load_prompts(str(tmp_path / "bad.csv"))
    for name, content, told in (
        ("latin1.txt", "Löwe".encode("latin-1"), r"latin1\.txt' is no text in UTF-8"),
        ("none.json", b"a star", "is no JSON"),
        ("deep.json", b"[" * 100_000, "is no JSON"),
        ("lines.jsonl", b'{"prompt": "a"}\n\n{"prompt"}\n', "line 3 is no JSON"),
        ("lacking.jsonl", b'{"prompt": "a"}\n{"seed": 1}\n', r"entry 2: \{'seed': 1\} is no prompt: .* as 'prompt'"),
        ("null.jsonl", b'{"prompt": null}\n', "entry 1"),
        ("mixed.json", b'["a", 2]', "entry 2: 2 is no prompt"),
        ("text.json", b'"a star"', "holds 'a star': write a list"),
        ("coco.json", b'{"annotations": 3}', "holds 3"),
        ("short.csv", b"id,prompt\n1,a\n2\n", "entry 2"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            load_prompts(str(tmp_path / name))
    with pytest.raises(ConfigError, match="drawbench"):
        load_prompts("unknown")
