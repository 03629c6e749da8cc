"""Metrics of clips, on clips whose values are known."""

import sys

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from ddit_rt import ConfigError
from ddit_rt.evaluate import CLIP, MetricUnavailableError
from ddit_rt.evaluate.adherence import load_reader
from ddit_rt.evaluate.optical_flow import Motion, find_flow, warp
from ddit_rt.evaluate.video_metrics import (
    consistency,
    error_growth,
    flicker,
    psnr_of_frames,
    smoothness,
    temporal_difference,
    warping,
    warping_error,
)

FRAMES, SIDE, SPEED = 7, 64, 2


def texture(seed: int = 0, side: int = 2 * SIDE) -> torch.Tensor:
    """(3, side, side), smooth and without repetition."""
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    return ((smooth - smooth.amin()) / (smooth.amax() - smooth.amin()))[0]


@pytest.fixture(scope="module")
def moving():
    """A texture that moves SPEED pixels to the left in every frame: (1, F, 3, SIDE, SIDE)."""
    whole = texture()
    return torch.stack([whole[:, :SIDE, SPEED * i : SPEED * i + SIDE] for i in range(FRAMES)])[None]


def test_the_psnr_of_frames_against_scikit_image(moving):
    noisy = (moving + 0.03 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = [peak_signal_noise_ratio(b.numpy(), n.numpy(), data_range=1.0) for n, b in zip(noisy[0], moving[0])]
    assert psnr_of_frames(noisy, moving) == pytest.approx(expected, abs=1e-3)
    assert psnr_of_frames(moving, moving) == [100.0] * FRAMES
    both = psnr_of_frames(torch.cat([noisy, moving]), torch.cat([moving, moving]))
    assert both == pytest.approx([(value + 100) / 2 for value in expected], abs=1e-3)


def test_growth_is_the_fall_of_the_line_through_the_frames():
    base = torch.full((1, 9, 3, 8, 8), 0.5)
    falling = base + 10 ** (-torch.linspace(40, 32, 9) / 20).view(1, 9, 1, 1, 1)
    assert error_growth(falling, base) == pytest.approx(8, abs=1e-3)
    assert error_growth(falling.flip(1), base) == pytest.approx(-8, abs=1e-3)
    level = base + 0.01
    level[:, 4] += 0.1  # one bad frame in the middle is no growth
    assert error_growth(level, base) == pytest.approx(0, abs=1e-4)


def test_flicker_is_vbenchs_change_over_the_base_clips(moving):
    blinking = moving + 0.1 * (torch.arange(FRAMES) % 2).view(1, -1, 1, 1, 1)
    change = [np.abs(b - a).mean() for a, b in zip(moving[0].numpy(), moving[0, 1:].numpy())]
    assert temporal_difference(moving) == pytest.approx(np.mean(change))
    assert flicker(moving, moving) == 1 and flicker(blinking, moving) > 1.2
    still = moving[:, :1].expand(-1, FRAMES, -1, -1, -1)
    assert flicker(still, moving) == 0 and flicker(still, still) == 1 and flicker(moving, still) == 100


def test_flow_follows_a_texture_that_moves(moving):
    motion = find_flow()(moving[0, :-1], moving[0, 1:])
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    across, down = motion.there[inner].unbind(1)
    assert across.median() == pytest.approx(-SPEED, abs=0.1) and down.median() == pytest.approx(0, abs=0.1)
    assert motion.back[:, 0].median() == pytest.approx(SPEED, abs=0.1)
    assert motion.visible[inner].float().mean() > 0.95
    assert not motion.visible[..., 0].any(), "what leaves the picture is not seen in the next frame"


def test_a_warp_looks_things_up_where_the_flow_points():
    frames = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0], flow[:, 1] = 2, 1
    assert torch.allclose(warp(frames, flow)[..., :7, :6], frames[..., 1:, 2:], atol=1e-5)


def test_the_warping_error_by_hand():
    clip = torch.zeros(2, 3, 8, 8)
    clip[1] = 0.5
    none = torch.zeros(1, 2, 8, 8)
    visible = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    assert warping_error(clip, Motion(none, none, visible)) == 0
    visible[..., :4] = True
    clip[1, ..., 4:] = 1.0  # hidden
    assert warping_error(clip, Motion(none, none, visible)) == pytest.approx(0.25)


def test_the_warping_error_beyond_the_base_clips_own(moving):
    score = warping()
    assert score(moving, moving) == 0
    trembling = moving + 0.1 * (torch.arange(FRAMES) % 2).view(1, -1, 1, 1, 1)
    assert score(trembling, moving) == pytest.approx(0.01, rel=0.15)
    still = moving[:, :1].expand(-1, FRAMES, -1, -1, -1)
    assert score(still, moving) > 1e-3, "what should have moved"
    assert score(torch.cat([trembling, moving]), torch.cat([moving, moving])) == pytest.approx(0.005, rel=0.15)


def test_even_motion_is_smooth_and_jumps_are_not(moving):
    score = smoothness()
    uneven = moving.clone()
    uneven[:, 1::2] = moving[:, :-1:2]  # every second frame waits
    blended = 1 - float((moving[:, 1:-1:2] - (moving[:, :-2:2] + moving[:, 2::2]) / 2).abs().mean())
    even = score(moving, moving)
    assert even > 0.99 and even > blended and score(uneven, moving) < even - 0.01
    longer = torch.cat([moving, moving[:, -1:]], dim=1)  # the last odd frame has no neighbour after it
    assert score(longer, longer) == even


def test_consistency_is_vbenchs_mean_of_cosines(moving):
    score = consistency()
    still = moving[:, :1].expand(-1, FRAMES, -1, -1, -1)
    assert score(still, moving) == pytest.approx(1, abs=1e-5)
    cut = torch.cat([moving[:, :4], texture(5, SIDE)[None, None].expand(-1, 3, -1, -1, -1)], dim=1)
    small = torch.nn.functional.interpolate(cut[0], (128, 128), mode="area")
    features = load_reader().features(small).mean((2, 3)).numpy()

    def cosine(a, b):
        return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    pairs = [(cosine(features[i - 1], features[i]) + cosine(features[0], features[i])) / 2 for i in range(1, FRAMES)]
    assert score(cut, moving) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert score(cut, moving) < score(moving, moving)


@pytest.mark.parametrize("name", CLIP)
def test_what_is_no_clip_is_refused_with_its_shape(name):
    score = CLIP[name]()
    for shape in ((1, 3, 32, 32), (1, 1, 3, 32, 32)):
        with pytest.raises(ConfigError, match=r"clips of shape \(1, "):
            score(torch.zeros(shape), torch.zeros(shape))


def test_without_opencv_two_metrics_say_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for load in (warping, smoothness):
        with pytest.raises(MetricUnavailableError, match=r"opencv-python-headless .*ddit-rt\[eval\]'\)"):
            load()
