"""What accelerating holds beside what the plain pipeline does, at Wan 2.1 1.3B's width: histories are a few latents."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from live_memory import LiveMemory
from pipe_models import WAN_SIZES

import ddit_rt

STEPS = 8
SCHEDULES = {
    "skipped": {"schedule": [1, 1, 0, 1, 0, 1, 0, 1]},
    "coarse": {"schedule": [1, 1, 2, 1, 4, 0, 1, 2]},
    "two frames": {"schedule": [1, 1, 21, 1, 22, 0, 1, 2], "multiples": (1, 2, 21, 22)},
    "threshold": {"threshold": 1e9, "coarse": "delta"},
    "target": {"speedup": 2},
}


@pytest.fixture(scope="module")
def pipe():
    """One block: activations of one are all that live at once."""
    torch.manual_seed(0)
    sizes = {**WAN_SIZES["1.3B"], "num_layers": 1}
    transformer = WanTransformer3DModel(text_dim=64, qk_norm="rms_norm_across_heads", **sizes)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer.eval().requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peak(pipe):
    embeds = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    with LiveMemory() as memory:
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=-embeds, height=128, width=128, num_frames=13,
            num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return memory.peak


@pytest.fixture(scope="module")
def plain(pipe):
    return peak(pipe)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_accelerated_call_holds_at_most_a_twentieth_more_than_a_plain_one(pipe, plain, name):
    with ddit_rt.accelerated(pipe, **SCHEDULES[name]):
        accelerated = peak(pipe)
        assert set(ddit_rt.report(pipe).schedule) - {1}
    assert accelerated <= 1.05 * plain


def test_afterwards_nothing_is_left(pipe, plain):
    assert peak(pipe) <= 1.001 * plain
