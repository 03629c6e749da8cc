"""The moving scenes' grammar, determinism, motion and painting."""

from random import Random

import numpy as np
import pytest

from examples.demo_video.export import PROMPTS
from examples.demo_video.scenes import CLIP_FRAMES, MOTIONS, VOCABULARY, caption, caption_spans, render, sample_clip
from examples.demo_video.sizes import Sizes


def clips(count=300):
    for seed in range(count):
        rng = Random(seed)
        yield sample_clip(rng), rng


def test_captions_stay_inside_the_vocabulary_and_the_text_length():
    for clip, rng in clips():
        words = caption(clip, rng).split()
        assert set(words) <= set(VOCABULARY)
        assert len(words) < Sizes().text_tokens


def test_the_prompts_are_inside_the_grammar():
    for prompt in PROMPTS.values():
        assert set(prompt.split()) <= set(VOCABULARY)


def test_same_seed_same_clip_caption_and_frames():
    first, second = Random(7), Random(7)
    a, b = sample_clip(first), sample_clip(second)
    assert a == b and caption(a, first) == caption(b, second)
    np.testing.assert_array_equal(render(a, (64,))[0], render(b, (64,))[0])
    assert sample_clip(Random(8)) != a


def test_spans_name_only_what_the_clip_holds():
    for clip, rng in clips():
        for span in caption_spans(clip, rng):
            if isinstance(span.about, int):
                noun, motion = clip.nouns[span.about], clip.actors[span.about].motion
                assert noun.shape in span.words
                assert span.words[len(span.words) - len(MOTIONS[motion]) :] == MOTIONS[motion]
            if span.about == "fence":
                assert clip.fence is not None
            if span.about == "background":
                assert ("drifting" in span.words) == (clip.drift != 0)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", "x", -1), ("right", "x", 1), ("up", "y", -1), ("down", "y", 1)]
)
def test_what_moves_goes_where_its_caption_says(motion, axis, sign):
    seen = 0
    for clip, _ in clips():
        for actor in clip.actors:
            if actor.motion == motion:
                seen += 1
                assert sign * (getattr(actor.at(1), axis) - getattr(actor.at(0), axis)) > 0.25
    assert seen > 5


def test_things_stay_in_sight():
    for clip, _ in clips():
        for actor in clip.actors:
            for time in np.linspace(0, 1, 9):
                thing = actor.at(time)
                assert -0.1 < thing.x < 1.1 and -0.1 < thing.y < 1.1


@pytest.mark.parametrize("frames", [1, 5, CLIP_FRAMES, 33])
def test_render_has_the_asked_sizes_and_length(frames):
    large, small = render(sample_clip(Random(1)), (64, 32), frames)
    assert large.shape == (frames, 64, 64, 3) and small.shape == (frames, 32, 32, 3) and large.dtype == np.uint8


def test_a_shorter_clip_is_the_beginning_of_a_longer_one():
    clip = sample_clip(Random(2))
    np.testing.assert_array_equal(render(clip, (32,), 5)[0], render(clip, (32,), CLIP_FRAMES)[0][:5])


def test_only_what_moves_changes():
    moving = still = 0
    for clip, _ in clips(60):
        frames = render(clip, (32,))[0].astype(int)
        changed = np.abs(np.diff(frames, axis=0)).max() > 8
        if all(actor.motion == "still" for actor in clip.actors) and not clip.drift:
            still += 1
            assert not changed
        elif clip.drift:
            moving += 1
            assert changed
    assert moving and still


def test_a_size_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="48"):
        render(sample_clip(Random(1)), (48,))
