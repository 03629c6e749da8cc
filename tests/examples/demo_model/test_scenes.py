"""The scenes' grammar, determinism and painting."""

from random import Random

import numpy as np
import pytest

from ddit_rt.demo import DEMO_PROMPTS
from examples.demo_model.scenes import VOCABULARY, caption, caption_spans, render, render_pyramid, sample_scene


def test_captions_stay_inside_the_vocabulary_and_the_text_length():
    for seed in range(500):
        rng = Random(seed)
        words = caption(sample_scene(rng), rng).split()
        assert set(words) <= set(VOCABULARY)
        assert len(words) < 24


def test_demo_prompts_are_inside_the_grammar():
    for prompt in DEMO_PROMPTS.values():
        assert set(prompt.split()) <= set(VOCABULARY)


def test_same_seed_same_scene_caption_and_picture():
    first, second = Random(7), Random(7)
    a, b = sample_scene(first), sample_scene(second)
    assert a == b
    assert caption(a, first) == caption(b, second)
    np.testing.assert_array_equal(render(a, 64), render(b, 64))
    assert sample_scene(Random(8)) != a


def test_captions_leave_the_scene_open():
    captions = {}
    for seed in range(400):
        rng = Random(seed)
        scene = sample_scene(rng)
        captions.setdefault(caption(scene, rng), set()).add(scene.background.colour_name)
    assert any(len(backgrounds) > 2 for backgrounds in captions.values())


def test_spans_name_only_what_the_scene_holds():
    for seed in range(200):
        rng = Random(seed)
        scene = sample_scene(rng)
        for span in caption_spans(scene, rng):
            if isinstance(span.about, int):
                noun = scene.nouns[span.about]
                assert any(word.startswith(noun.shape) for word in span.words)
            if span.about == "fence":
                assert scene.fence is not None


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_render_has_the_asked_size(size):
    picture = render(sample_scene(Random(1)), size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8


def test_resolutions_show_the_same_picture():
    large, small = render_pyramid(sample_scene(Random(3)), (128, 32))
    mean = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(mean - small).max() <= 1


def test_sizes_that_do_not_divide_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\(128, 50\)"):
        render_pyramid(sample_scene(Random(0)), (128, 50))
