"""Bad data is named: refused, or skipped and told."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from distill_models import CALL, pipeline
from PIL import Image

import ddit_rt
from ddit_rt import ConfigError
from ddit_rt.cli.distill import _own_captions
from ddit_rt.demo import DISTILL_PROMPTS
from ddit_rt.distill import (
    BadDataError,
    Checked,
    DistillConfig,
    Prompts,
    Trainer,
    picture_dataset,
    picture_folder,
    read_prompts,
)
from ddit_rt.distill.data import fitted
from ddit_rt.distill.recordings import Library
from ddit_rt.evaluate import load_prompts
from ddit_rt.families import family_of
from ddit_rt.pipeline import DEMO_VIDEO, SHIPPED


@pytest.mark.parametrize("model", SHIPPED)
def test_a_shipped_model_has_captions_to_distill_on(model):
    prompts = _own_captions(model, None, 0)
    assert len(prompts) >= 300 and all(prompts) and _own_captions(model, 5, 0) == prompts[:5]
    with pytest.raises(ConfigError, match=f"items=9999: there are .* {model} prompts"):
        _own_captions(model, 9999, 0)


def test_no_video_is_distilled_on_that_is_evaluated():
    assert not set(DISTILL_PROMPTS[DEMO_VIDEO].read_text().splitlines()) & set(load_prompts(DEMO_VIDEO))


def checked(skip):
    told: list[str] = []
    return Checked(skip, told.append), told


def refuse():
    return checked(False)[0]


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        Image.new("RGB", (40 + index, 40), (index * 60, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"a red square {index}\n")
    return tmp_path


def spoil(folder, what):
    if what == "unreadable":
        (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:40])
        (folder / "bad.txt").write_text("a ball")
    elif what == "small":
        Image.new("RGB", (16, 40)).save(folder / "bad.png")
        (folder / "bad.txt").write_text("a ball")
    else:
        Image.new("RGB", (40, 40)).save(folder / "bad.png")
        if what == "empty":
            (folder / "bad.txt").write_text("  \n")


@pytest.mark.parametrize(
    ("what", "match"),
    [("unreadable", "unreadable"), ("small", "16 x 40 pixels"), ("empty", "is empty"), ("missing", "is missing")],
)
def test_bad_pictures(folder, what, match):
    spoil(folder, what)
    with pytest.raises(BadDataError, match=f"bad.png.*{match}"):
        picture_folder(folder, (32, 32), 5, refuse())
    check, told = checked(True)
    assert len(picture_folder(folder, (32, 32), 5, check).captions) == 4
    assert len(told) == 1 and "bad.png" in told[0]


def test_a_limit_takes_the_first_pictures_that_can_be_used(folder):
    (folder / "0.txt").write_text("")
    check, told = checked(True)
    source = picture_folder(folder, (32, 32), 5, check, 2)
    assert source.captions == ["a red square 1", "a red square 2"] and len(told) == 1
    assert len(picture_folder(folder, (32, 32), 5, check, 9).captions) == 3


def test_bad_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a ball\n\n\xff\xfe\na star\n")
    with pytest.raises(BadDataError, match=r"prompts\.txt:2: an empty prompt"):
        read_prompts(file, refuse())
    check, told = checked(True)
    assert read_prompts(file, check) == ["a ball", "a star"]
    assert len(told) == 2 and "prompts.txt:3" in told[1]
    file.write_text("\n")
    with pytest.raises(BadDataError, match="holds no prompt"):
        read_prompts(file, check)


def test_dataset_rows():
    rows = [
        {"image": Image.new("RGB", (64, 48)), "text": "a ball"},
        {"image": None, "text": "a star"},
        {"image": Image.new("RGB", (64, 48)), "text": ""},
        {"image": Image.new("L", (40, 40)), "text": "a house"},
        {"image": Image.new("RGB", (40, 40)), "text": "one too many"},
    ]
    check, told = checked(True)
    source = picture_dataset(rows, "image", "text", 2, (32, 32), 5, check)
    assert source.captions == ["a ball", "a house"] and source._open(1).mode == "RGB"
    assert [text.split(":")[1].strip() for text in told] == ["row 1", "row 2"]
    with pytest.raises(BadDataError, match="row 1"):
        picture_dataset(rows, "image", "text", 2, (32, 32), 5, refuse())


def test_pictures_are_scaled_and_cropped_about_the_centre():
    picture = Image.new("RGB", (60, 30))
    picture.paste((255, 0, 0), (15, 0, 45, 30))
    assert fitted(picture, (20, 20)).getpixel((10, 10)) == (255, 0, 0)
    assert fitted(picture, (20, 20)).size == (20, 20)


def test_training_on_pictures(folder, tmp_path):
    source = picture_folder(folder, (32, 32), 4, refuse())
    config = DistillConfig(
        steps=2, batch=2, accumulate=1, rank=2, optimizer="adamw", held_out=1, max_gap=2, validate_every=100
    )
    run = Trainer(pipeline(), source, {**CALL, "num_inference_steps": 10}, config, tmp_path / "run", log=lambda _: None)
    shard = run.recorded.shard(0)
    assert shard.steps == 4 and 0 < shard.sigmas[0] <= 1 and len(shard.sigmas) == 5
    run.train()
    ddit_rt.load_adapter(tmp_path / "run")


def test_guidance_is_a_stream_of_its_own():
    pipe = pipeline()
    call = {**CALL, "negative_prompt": "", "true_cfg_scale": 3.0}
    recording = Prompts(["a red ball", "a star", "a house"]).record(pipe, family_of(pipe), call, [0, 1, 2], 0, 4)
    assert len(recording.predictions) == 2 and recording.predictions[1].shape[:2] == (4, 3)
    words = [arguments["encoder_hidden_states"] for arguments in recording.arguments]
    assert not torch.allclose(*words) and torch.equal(words[1][0], words[1][2])


def test_processes_open_a_library_at_once(tmp_path):
    """Threads stand in for the processes of a run: each finds the manifest absent or whole."""
    manifest = {"calls": ["a" * 100_000]}

    def opened(number: int) -> None:
        barrier.wait()
        Library(tmp_path / str(number // 4), lambda index: None, 1, 0, manifest, torch.float32)

    barrier = threading.Barrier(4, timeout=60)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(opened, range(400)))
    assert [path.name for path in (tmp_path / "99").iterdir()] == ["manifest.json"]
    with pytest.raises(ddit_rt.ConfigError, match="another model, scheduler, call or data"):
        Library(tmp_path / "99", lambda index: None, 1, 0, {"calls": []}, torch.float32)
