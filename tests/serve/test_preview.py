"""Previews without a VAE, and when to make them."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from ddit_rt.serve.preview import ENOUGH, Pace, PreviewDecoder, middle_frame


def _scene(seed: int, rows: int = 24, columns: int = 32) -> tuple[torch.Tensor, np.ndarray]:
    """A smooth latent of four channels, and the picture that a linear decoder makes of it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 4, rows // 4, columns // 4, generator=generator)
    latent = functional.interpolate(coarse, (rows, columns), mode="bilinear")[0]
    mixing = torch.tensor([[0.1, 0.0, 0.1, 0.0], [0.0, 0.1, 0.0, -0.1], [0.05, 0.05, 0.0, 0.0]])
    colours = torch.einsum("kc,chw->khw", mixing, latent) + 0.5
    large = functional.interpolate(colours[None], scale_factor=8, mode="nearest")[0].clamp(0, 1)
    return latent, large.permute(1, 2, 0).numpy()


def test_it_learns_a_linear_decoder_from_one_picture() -> None:
    decoder = PreviewDecoder()
    assert decoder.decode(torch.zeros(4, 8, 8)) is None
    decoder.learn(*_scene(0))
    latent, picture = _scene(1)
    made = decoder.decode(latent)
    assert made is not None and made.shape == (96, 128, 3) and made.dtype == np.uint8
    small = picture.reshape(96, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(made / 255 - small).mean() < 0.01


def test_it_takes_in_other_sizes_and_stops_when_it_has_seen_enough() -> None:
    decoder = PreviewDecoder()
    for seed in range(ENOUGH + 3):
        decoder.learn(*_scene(seed, 24 if seed % 2 else 16))
    assert decoder.learnt == ENOUGH
    before = decoder.decode(_scene(99)[0])
    decoder.learn(_scene(5)[0] * 100, _scene(6)[1])
    assert np.array_equal(before, decoder.decode(_scene(99)[0]))  # type: ignore[arg-type]


def test_the_pace_of_a_run_is_learnt_for_its_settings() -> None:
    pace = Pace()
    assert pace.passed("any", 5, 10) == 0.5
    pace.learn("early", [1.0, 1.0, 0.0, 0.0])
    assert pace.passed("early", 1, 4) == 0.5
    assert pace.passed("early", 5, 20) == 0.5  # another number of steps, the same curve
    assert pace.passed("other", 1, 4) == 0.5
    pace.learn("even", [1.0] * 4)
    assert pace.passed("even", 1, 4) == 0.25
    assert pace.passed("early", 1, 4) == 0.5
    pace.learn("nothing", [0.0])
    assert pace.passed("even", 1, 4) == 0.25


def test_the_middle_frame_of_a_causal_video() -> None:
    assert middle_frame(1, 1) == (0, 0)
    assert middle_frame(2, 5) == (1, 3)
    assert middle_frame(21, 81) == (10, 1 + 9 * 4 + 2)
