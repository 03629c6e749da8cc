"""FLUX.2 (dev, klein): tokens of 2 x 2 latent pixels in the whitened space of the VAE, ids of four axes, timestep = σ.

The scheduler steps the latent after its 128 patch channels have been whitened one by one. The noise there is white, so
the band split holds; the picture's means over neighbouring pixels are those of a smaller picture as far as the four
pixels of a patch share their statistics, as they do where the VAE treats places alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_flux2
from torch import nn

from ..granularity import Geometry
from .base import ModelInputs, NotCoarseError, present
from .packed import PositionIdFamily


class Flux2(PositionIdFamily):
    name = "flux2"
    transformer_class = Flux2Transformer2DModel
    pipelines = present("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    projection_names = ("x_embedder", "proj_out")
    attends_unmasked = True
    # before diffusers 0.40 it had none of its own
    output_class = getattr(transformer_flux2, "Flux2Transformer2DModelOutput", Transformer2DModelOutput)
    time_scale = 1.0
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
        r"|single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)",
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }
    limits: ClassVar[dict[str, str]] = {
        "first-block cache": "diffusers 0.42's FirstBlockCache fails on FLUX.2's blocks, without ddit_rt too",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        if arguments.get("kv_cache_mode") is not None:
            raise NotCoarseError("kept keys and values of references belong to full steps")
        return super().parse(module, arguments)

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        # dev takes guidance as an input; klein has it in two runs unless it is distilled
        return not isinstance(pipe, Flux2Pipeline) and call["guidance_scale"] > 1 and not pipe.config.is_distilled

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        total = geometry.tokens(multiple) + text_tokens
        layers = config.num_layers + config.num_single_layers
        # per token and block: attention 4 d², gated feed-forward 3 · mlp_ratio d²
        blocks = layers * (4 + 3 * config.mlp_ratio) * width**2 * total
        attention = layers * 2 * total**2 * width
        # three modulations for all blocks together, 6 d² twice and 3 d², and the output norm
        modulation = (6 + 6 + 3 + 2) * width**2
        embedders = 2 if config.guidance_embeds else 1
        times = embedders * (config.timestep_guidance_channels * width + width**2)
        ends = geometry.tokens(multiple) * 2 * config.in_channels * width
        return 2.0 * (blocks + attention + modulation + times + ends + text_tokens * config.joint_attention_dim * width)
