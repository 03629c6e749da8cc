"""HunyuanVideo 1.5: masks that differ between the calls of a step, the pipeline's guidance, tokens of three kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15Transformer3DModel, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from specimens import SPECIMENS
from specimens.hunyuan_video15 import TOKENS, TinyImageToVideo, hunyuan_call, hunyuan_video
from torch.overrides import TorchFunctionMode

from ddit_rt import UnsupportedPipelineError, accelerated, report
from ddit_rt.config import DDiTConfig
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.families.hunyuan_video15 import GLYPHS, PICTURE, TEXT, HunyuanVideo15
from ddit_rt.families.testing import counted_flops
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Geometry
from ddit_rt.pipeline import AcceleratedPipeline
from ddit_rt.runtime import Recording

SCHEDULE = [1, 1, 2, 4, 1, 0, 2, 1]
SIZE = {"height": 128, "width": 128}


def run(pipe: Any, **options: Any) -> torch.Tensor:
    return pipe(**{**hunyuan_call(**SIZE), **options}).frames


def first(name: str = "hunyuan-video-1.5") -> Any:
    return first_call(SPECIMENS[name])


def test_a_call_as_it_is_read() -> None:
    text, image = first(), first("hunyuan-video-1.5-image")
    assert text.call.geometry == Geometry(4, 2, 8, 12, 1) and text.call.text_tokens == sum(TOKENS)
    assert text.call.condition.shape == (*image.call.condition.shape[:3], 8, 12) and not text.call.condition.any()
    mask = image.call.condition[:, -1]
    assert mask[:, 0].all() and not mask[:, 1:].any()
    given = text.family.low_arguments(text.call, text.call.latent[..., ::2, ::2], 0.5, 2, True)
    assert given["hidden_states"].shape == (1, 9, 2, 4, 6)
    bf16 = text.family.parse(text.module, {**text.arguments, "timestep": text.arguments["timestep"].bfloat16()})
    # the embedding of time would meet weights of another dtype
    assert text.family.low_arguments(bf16, bf16.latent, 0.5, 1, True)["timestep"].dtype == torch.bfloat16
    with pytest.raises(NotCoarseError, match="a second timestep"):
        text.family.parse(text.module, {**text.arguments, "timestep_r": text.arguments["timestep"]})


@pytest.mark.parametrize("multiple", [1, 2])
def test_centres_lie_between_the_patches(multiple: int) -> None:
    caught = first()
    module, geometry = caught.module, caught.call.geometry
    rows, columns = geometry.grid(multiple)
    own = [t.reshape(2, 8, 12, -1) for t in module.rope(caught.arguments["hidden_states"])]
    with caught.family.placed(module, caught.call, multiple, False):
        cos, sin = (t.reshape(2, rows, columns, -1) for t in module.rope(None))
    # twice the angle at a centre is the sum of the angles of the first and the last patch covered
    ends = [slice(i, None, multiple) for i in (0, multiple - 1)]
    (a, b), (c, d) = ([t[:, end, end] for t in own] for end in ends)
    space = slice(module.rope.rope_dim[0], None)
    torch.testing.assert_close((cos**2 - sin**2)[..., space], (a * c - b * d)[..., space])
    torch.testing.assert_close((2 * sin * cos)[..., space], (a * d + b * c)[..., space])
    time = slice(0, module.rope.rope_dim[0])
    torch.testing.assert_close(cos[..., time], own[0][:, :rows, :columns, time])


def test_the_calls_of_a_step_keep_their_own_masks() -> None:
    """Were one call's masks used for the other, the negative prompt's masked tokens would change nothing."""
    pipe, results = hunyuan_video(guidance=3.0), []
    for value in (0.0, 1.0):
        given = hunyuan_call(**SIZE)
        given["negative_prompt_embeds"][:, 20:] += value  # masked for the prompt, not for the negative one
        given["prompt_embeds"][:, 20:] += value
        with accelerated(pipe, schedule=SCHEDULE):
            results.append(pipe(**given).frames)
    assert not torch.equal(*results)
    given = hunyuan_call(**SIZE)
    given["prompt_embeds"][:, 20:] = 7.0
    with accelerated(pipe, schedule=SCHEDULE):
        found = pipe(**given).frames
    torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-4)


def test_guidance_is_the_pipelines() -> None:
    pipe, family = hunyuan_video(), HunyuanVideo15()
    for settings, guided in (
        ({"guidance_scale": 6.0}, True),
        ({"guidance_scale": 1.0}, False),
        ({"guidance_scale": 1.0, "use_original_formulation": True}, True),
        ({"guidance_scale": 6.0, "enabled": False}, False),
        ({"guidance_scale": 6.0, "stop": 0.5}, False),
    ):
        pipe.guider = ClassifierFreeGuidance(**settings)
        assert family.is_guided(pipe, {}) is guided, settings


@pytest.mark.parametrize(
    "guider",
    [
        ClassifierFreeGuidance(guidance_scale=3.0, start=0.5),
        ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5),
        SkipLayerGuidance(guidance_scale=3.0, skip_layer_config=LayerSkipConfig(indices=[0], fqn="transformer_blocks")),
    ],
    ids=["begins", "ends", "skips layers"],
)
def test_other_guidance(guider: Any) -> None:
    pipe = hunyuan_video()
    pipe.guider = guider
    plain = run(pipe)
    with accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe), plain)
    with accelerated(pipe, schedule=SCHEDULE):
        assert torch.isfinite(run(pipe)).all()
        assert report(pipe).complete


def test_no_graph_is_tried_for_a_forward_that_looks_at_values() -> None:
    pipe, recording = hunyuan_video(), Recording()
    made = AcceleratedPipeline(pipe, family_of(pipe), DDiTConfig(schedule=SCHEDULE), capture=recording)
    made.attach()
    try:
        run(pipe)
        assert {step.executed for step in report(pipe).steps} == {"eager", "cached"}
        assert recording.warmups == 0
    finally:
        made.detach()


def test_patches_over_several_frames_are_refused() -> None:
    pipe = hunyuan_video(TinyImageToVideo)
    pipe.transformer.register_to_config(patch_size_t=2)
    with pytest.raises(UnsupportedPipelineError, match=r"patch size \(2, 1, 1\)"):
        family_of(pipe)


class AllValid(TorchFunctionMode):
    """Answers what the forward asks of tensors without values: there is no picture, and no token is masked."""

    def __init__(self) -> None:
        super().__init__()
        self._inverted: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            tokens, mask = args
            return tokens[:0] if any(mask is one for one in self._inverted) else tokens
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__invert__:
            self._inverted.append(result)
        return result


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_flops_of_the_published_model(multiple: int) -> None:
    geometry = Geometry(32, 31, 30, 53, 1)  # 121 frames of 480 x 848
    with torch.device("meta"):
        module = HunyuanVideo15Transformer3DModel()  # its defaults are the 8.3B model's
        given = {
            "hidden_states": torch.empty(1, 65, geometry.frames, *geometry.grid(multiple)),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, TEXT, 3584),
            "encoder_attention_mask": torch.empty(1, TEXT),
            "encoder_hidden_states_2": torch.empty(1, GLYPHS, 1472),
            "encoder_attention_mask_2": torch.empty(1, GLYPHS),
            "image_embeds": torch.empty(1, PICTURE, 1152),
        }
    found = HunyuanVideo15().flops(module, geometry, multiple, TEXT + GLYPHS + PICTURE)
    with AllValid():
        counted = counted_flops(lambda: module(**given))
    assert found == pytest.approx(counted, rel=0.01)
