"""HunyuanVideo 1.5: latents of 32 channels on patches of one pixel, rotary positions made inside, timestep = 1000 σ.

Condition channels follow the latent's: 32 of an encoded picture and the mask of its frame, all zero without one. Text,
the glyphs in it (ByT5) and a picture's tokens stand beside the video's in every block, behind masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import Geometry, Scalar, bands, coarse_centres
from .base import ModelInputs, NotCoarseError
from .grid import GridFamily, Rotary, spread

TEXT, GLYPHS, PICTURE = 1000, 256, 729
"""Tokens of each kind that the pipelines give, masked ones included."""
GLYPH_WIDTH = 2048
"""Of the layers between ByT5's embeddings and the blocks."""


class HunyuanVideo15(GridFamily):
    name = "hunyuan-video-1.5"
    transformer_class = HunyuanVideo15Transformer3DModel
    pipelines = (HunyuanVideo15Pipeline, HunyuanVideo15ImageToVideoPipeline)
    projection_names = ("x_embedder.proj", "proj_out")
    channels_first = True
    time_scale = 1000.0
    distill_optimizer = "adamw"
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }
    graph_obstacle = "its forward looks at values on the host: whether there is a picture, and which text is masked"
    limits: ClassVar[dict[str, str]] = {
        "graphs": graph_obstacle,
        "first-block cache": "diffusers' FirstBlockCache does not know the blocks of HunyuanVideo 1.5",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        if arguments.get("timestep_r") is not None:
            raise NotCoarseError("a second timestep (MeanFlow) says how far a step goes, which coarse tokens change")
        return super().parse(module, arguments)

    def patch(self, config: Any) -> int:
        return int(config.patch_size)

    def coarse_time(self, call: ModelInputs, sigma: Scalar, multiple: int) -> torch.Tensor:
        # time is embedded in the timestep's dtype, which has to be that of the weights
        return bands.noise_level(call.arguments["timestep"], self.time_of(sigma))

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        kinds = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return sum(int(arguments[name].shape[1]) for name in kinds)

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        # guidance is the pipeline's, not the call's, and may be on in a part of the steps
        config = pipe.guider.config
        neutral = 0.0 if config.get("use_original_formulation") else 1.0
        whole = config.get("start", 0.0) == 0.0 and config.get("stop", 1.0) == 1.0
        return bool(pipe.guider._enabled and whole and pipe.guider.guidance_scale != neutral)

    def centred_rope(self, module: nn.Module, geometry: Geometry, multiple: int, device: torch.device) -> Rotary:
        rope = module.rope
        rows, columns = geometry.grid(multiple)
        frames = torch.arange(geometry.frames, device=device, dtype=torch.float32)
        axes = (frames, coarse_centres(rows, multiple, device), coarse_centres(columns, multiple, device))
        return spread(
            [
                get_1d_rotary_pos_embed(dim, centres, rope.theta, use_real=True)
                for dim, centres in zip(rope.rope_dim, axes)
            ]
        )

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        video = geometry.tokens(multiple)
        total = video + text_tokens
        # per token: attention 4 d², feed-forward 2 · mlp_ratio d², for the video's tokens and those beside them alike
        per_token = (4 + 2 * config.mlp_ratio) * width**2
        blocks = config.num_layers * (per_token * total + 2 * total**2 * width + 2 * 6 * width**2)
        ends = video * geometry.patch**2 * (config.in_channels + config.out_channels) * width
        # what comes before the blocks differs by kind; a call is taken to have them in the pipelines' proportion
        text, glyphs, picture = (text_tokens * n / (TEXT + GLYPHS + PICTURE) for n in (TEXT, GLYPHS, PICTURE))
        refiner = config.num_refiner_layers * (12 * width**2 * text + 2 * text**2 * width + 2 * width**2)
        refiner += text * config.text_embed_dim * width + (config.text_embed_dim + 256 + 2 * width) * width
        embedded = glyphs * (config.text_embed_2_dim + GLYPH_WIDTH + width) * GLYPH_WIDTH
        embedded += picture * (config.image_embed_dim**2 + config.image_embed_dim * width)
        times = (256 + width + 2 * width) * width  # and the output norm
        return 2.0 * (blocks + ends + refiner + embedded + times)

    def check_pipeline(self, pipe: Any) -> None:
        config = pipe.transformer.config
        if config.patch_size_t != 1:
            size = (config.patch_size_t, config.patch_size, config.patch_size)
            raise UnsupportedPipelineError(
                f"transformer has patch size {size}; coarse patches are defined for (1, p, p)."
            )
