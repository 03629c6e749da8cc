"""What the documentation says of the shipped video model, and that its clips follow their captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

import ddit_rt
from ddit_rt.evaluate import generate
from ddit_rt.pipeline import DEMO_VIDEO, SHIPPED, call_defaults, load_any
from ddit_rt.trajectories import psnr

CALL = {**call_defaults(DEMO_VIDEO), "num_inference_steps": 12}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_any(DEMO_VIDEO)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clips(pipe: Any) -> dict[str, torch.Tensor]:
    """Colour -> plain clip of a square of it, (13, 3, 128, 128)."""
    colours = ("red", "green", "blue")
    calls = {colour: {**CALL, "prompt": f"a {colour} square moves right on a white background"} for colour in colours}
    return {colour: generate(pipe, None, 0, **call).frames[0] for colour, call in calls.items()}


def test_it_is_diffusers_own_wan_and_small(pipe: Any) -> None:
    assert type(pipe) is WanPipeline
    assert (type(pipe.transformer), type(pipe.vae)) == (WanTransformer3DModel, AutoencoderKLWan)
    size = sum(path.stat().st_size for path in SHIPPED[DEMO_VIDEO].rglob("*") if path.is_file())
    assert size < 30e6
    assert sum(weight.numel() for weight in pipe.transformer.parameters()) == pytest.approx(5e6, rel=0.05)


def test_a_clip_has_1024_tokens_at_p(pipe: Any) -> None:
    with ddit_rt.accelerated(pipe, schedule=[1, 2, 4], coarse="band-split"):
        pipe(prompt="a red ball bounces", **{**CALL, "num_inference_steps": 3, "output_type": "latent"})
        assert [step.tokens for step in ddit_rt.report(pipe).steps] == [1024, 256, 64]


def test_clips_have_the_colours_of_their_captions(clips: dict[str, torch.Tensor]) -> None:
    for place, (colour, frames) in enumerate(clips.items()):
        rest = [channel for channel in range(3) if channel != place]
        excess = frames[:, place] - frames[:, rest].amax(1)
        assert (excess > 0.2).float().mean() > 0.02, colour  # a square of a tenth of the side at least
        others = torch.stack([frames[:, channel] - frames[:, place] for channel in rest]).amax(0)
        assert (excess > 0.2).sum() > 3 * (others > 0.2).sum(), colour


def test_what_moves_right_moves_right(clips: dict[str, torch.Tensor]) -> None:
    for frames in clips.values():
        seen = 1 - frames.amin(1)  # dark where the white background is not
        columns = (seen * (seen > 0.3)).sum(1)
        centre = (columns * torch.arange(128.0)).sum(1) / columns.sum(1)
        assert centre[-1] > centre[0] + 8


def test_a_target_stays_near_the_plain_clip(pipe: Any, clips: dict[str, torch.Tensor]) -> None:
    call = {**CALL, "prompt": "a red square moves right on a white background"}
    outcome = generate(pipe, {"speedup": 2}, 0, **call)
    assert outcome.report is not None and outcome.report.speedup_estimate == pytest.approx(2, abs=0.05)
    plain = clips["red"][None]
    assert psnr(outcome.frames, plain) > psnr(clips["blue"][None], plain) + 6
