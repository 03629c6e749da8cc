"""Wan 2.2 Animate: Wan with a pose video on the latent's grid, and a face video that every frame's tokens attend to.

The pipeline denoises a long video in segments, one after the other; every segment is a run of its own, with a report of
its own. The first latent frame is the character's picture. Poses are pooled with the grid; the face video is no matter
of tokens, and its encoder runs in every call that runs the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel
from torch import nn

from ..granularity import Geometry, Scalar, bands
from ..multiples import SUPPORTED_MULTIPLES
from .base import Family, ModelInputs
from .wan import Wan


class WanAnimate(Wan):
    name = "wan-animate"
    transformer_class = WanAnimateTransformer3DModel
    pipelines = (WanAnimatePipeline,)
    components = ("transformer",)
    attends_unmasked = False  # nobody has looked at what its face blocks do with other back-ends
    multiples = SUPPORTED_MULTIPLES  # poses and faces are frames that are given
    limits: ClassVar[dict[str, str]] = {
        "first-block cache": "diffusers 0.42's FirstBlockCache does not know its blocks, without ddit_rt too",
    }
    # nothing is published for it
    trunk = Family.trunk

    def frames_of(self, call: Mapping[str, Any]) -> int:
        return int(call["segment_frame_length"])

    def coarse_arguments(self, call: ModelInputs, sigma: Scalar, multiple: int) -> dict[str, Any]:
        pose = call.arguments["pose_hidden_states"]
        return {
            **super().coarse_arguments(call, sigma, multiple),
            "pose_hidden_states": bands.means(pose, call.geometry, multiple),
        }

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        made = super().geometry(pipe, height, width, frames)
        return Geometry(made.channels, made.frames + 1, made.height, made.width, made.patch)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        video, motion = geometry.tokens(multiple), config.face_encoder_num_heads + 1
        # query, output, and attention to the motion of its own frame; key and value of that
        layer = video * (2 * width + 2 * motion) * width + geometry.frames * motion * 2 * width**2
        layers = config.num_layers // config.inject_face_latents_blocks
        pose = video * geometry.patch**2 * config.latent_channels * width
        own = 2.0 * (layers * layer + pose) + _face_flops(module, 4 * (geometry.frames - 2) + 1)
        return super().flops(module, geometry, multiple, text_tokens) + own


def _face_flops(module: Any, frames: int) -> float:
    """Floating-point operations of the convolutions that encode a face video; what else encodes it is a hundredth."""
    encoder = module.motion_encoder
    side = encoder.size
    total = encoder.conv_in.weight.numel() * side**2 + encoder.conv_out.weight.numel()
    for block in encoder.res_blocks:
        total += block.conv1.weight.numel() * side**2
        side //= 2
        total += (block.conv2.weight.numel() + block.conv_skip.weight.numel()) * side**2
    return 2.0 * frames * float(total)
