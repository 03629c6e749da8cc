"""The training of the reader: labelled scenes, and what a run writes."""

import json
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from ddit_rt.evaluate.adherence import COLOURS, FIELDS, SHAPES, TEXTURES
from examples.demo_model.reader.labels import label, roughen
from examples.demo_model.scenes import sample_scene
from examples.demo_model.train import main


def test_labels_say_what_covers_a_cell():
    scene = next(s for s in (sample_scene(Random(i)) for i in range(99)) if len(s.things) == 1 and s.nouns[0].colour)
    batch = label([scene])
    (thing,), (noun,) = scene.things, scene.nouns
    shape, colour, texture = batch.places[0, :, int(thing.y * 16), int(thing.x * 16)].tolist()
    assert shape == 0 or (list(SHAPES)[shape - 1], list(COLOURS)[colour], TEXTURES[texture]) == (
        noun.shape, noun.colour, noun.texture,
    )  # fmt: skip
    assert (batch.places[0, 0] > 0).float().mean().item() == pytest.approx(3.14 * thing.radius**2, rel=0.6), (
        "about the area of the thing"
    )
    rough = roughen(batch.pictures.float() / 255, torch.Generator().manual_seed(0))
    assert rough.shape == batch.pictures.shape and rough.min() >= 0 and rough.max() <= 1


def test_a_short_training_writes_weights_and_what_they_are_worth(tmp_path):
    target = tmp_path / "reader.safetensors"
    given = [
        "--out",
        str(tmp_path / "run"),
        "--stage",
        "reader",
        "--tiny",
        "--threads",
        "1",
        "--reader-to",
        str(target),
    ]
    main([*given, "--steps", "1"])
    first = load_file(target)
    main([*given, "--steps", "2", "--resume"])
    second = load_file(target)
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)
    assert second["places.weight"].dtype == torch.float16
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert accuracy["clean"].keys() == accuracy["rough"].keys() == set(FIELDS)
