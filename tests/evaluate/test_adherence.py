"""Prompt adherence on the demo model: captions parsed into statements, and statements found in rendered scenes."""

from random import Random

import numpy as np
import pytest

from ddit_rt.demo import DEMO_PROMPTS
from ddit_rt.evaluate.adherence import (
    BACKGROUNDS,
    COLOURS,
    FIELDS,
    TEXTURES,
    WEIGHTS,
    Statement,
    load_reader,
    parse,
    read,
    to_pictures,
)
from examples.demo_model.reader.assessment import truths, untruth
from examples.demo_model.scenes import caption, caption_spans, render, sample_scene


def said(scene, spans):
    """What the spans of a caption state, from the scene they were written from."""
    statements = []
    for span in spans:
        words = set(span.words)
        if span.about == "fence":
            statements.append(Statement("fence", "fence"))
        elif span.about == "background":
            found = (("background kind", BACKGROUNDS), ("background colour", COLOURS))
            statements += [Statement(field, value) for field, values in found for value in values if value in words]
        elif span.about is not None:
            shape = scene.nouns[span.about].shape
            statements.append(Statement("shape", shape))
            found = (("colour", COLOURS), ("texture", TEXTURES))
            statements += [
                Statement(field, value, shape) for field, values in found for value in values if value in words
            ]
    return set(statements)


def test_captions_give_back_what_they_state():
    for seed in range(600):
        rng = Random(seed)
        scene = sample_scene(rng)
        spans = caption_spans(scene, rng)
        text = " ".join(word for span in spans for word in span.words)
        statements = parse(text)
        assert statements is not None, text
        assert set(statements) == said(scene, spans), text
        assert len(statements) == len(set(statements))
        assert set(statements) <= set(truths(scene)), text


def test_prompts_of_the_demo_are_inside_the_grammar():
    assert parse(DEMO_PROMPTS["plain"]) == (
        Statement("shape", "apple"), Statement("colour", "red", "apple"), Statement("background colour", "black"),
    )  # fmt: skip
    assert parse("Zebras behind a fence") == (Statement("shape", "zebra"), Statement("fence", "fence"))
    assert all(parse(prompt) for prompt in DEMO_PROMPTS.values())


@pytest.mark.parametrize(
    "text",
    ["", "a", "an astronaut", "a red", "a red blue ball", "a ball and", "a ball on a table", "a ball behind a house",
     "behind a fence", "a ball a star", "a red ball on a black background at night"],
)  # fmt: skip
def test_other_prompts_are_outside(text):
    assert parse(text) is None


@pytest.fixture(scope="module")
def rendered():
    """Captions, statements and readings of scenes that training never drew."""
    rng = Random("test of the reader")
    scenes = [sample_scene(rng) for _ in range(60)]
    statements = [parse(caption(scene, rng)) for scene in scenes]
    return scenes, statements, read(to_pictures([render(scene, 128) for scene in scenes]))


def test_right_prompts_score_high_and_shuffled_ones_low(rendered):
    _, statements, readings = rendered
    right = np.mean([reading.share(own) for reading, own in zip(readings, statements)])
    shuffled = np.mean([reading.share(other) for reading, other in zip(readings, statements[1:] + statements[:1])])
    assert right > 0.85
    assert shuffled < 0.5


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_tells_true_from_false(rendered, field):
    scenes, _, readings = rendered
    rng = Random(field)
    true = [r.finds(s) for scene, r in zip(scenes, readings) for s in truths(scene) if s.field == field]
    false = [r.finds(s) for scene, r in zip(scenes, readings) if (s := untruth(scene, field, rng)) is not None]
    assert np.mean(true) > 0.75
    assert np.mean(false) < 0.2


def test_a_colour_belongs_to_its_shape():
    rng = Random(3)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(200)) if len(scene.things) == 2]
    scenes = [s for s in scenes if len({n.shape for n in s.nouns}) == len({n.colour for n in s.nouns} - {None}) == 2]
    readings = read(to_pictures([render(scene, 128) for scene in scenes]))
    own = [r.finds(Statement("colour", s.nouns[0].colour, s.nouns[0].shape)) for s, r in zip(scenes, readings)]
    other = [r.finds(Statement("colour", s.nouns[1].colour, s.nouns[0].shape)) for s, r in zip(scenes, readings)]
    assert np.mean(own) > 0.75 and np.mean(other) < 0.2


def test_pictures_of_any_size_are_read_alike():
    scene = sample_scene(Random(5))
    small, large = (read(to_pictures([render(scene, side)]))[0] for side in (128, 256))
    assert [small.finds(s) for s in truths(scene)] == [large.finds(s) for s in truths(scene)]


def test_the_reader_is_small():
    assert WEIGHTS.stat().st_size < 900_000
    assert load_reader() is load_reader()
