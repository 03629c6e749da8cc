"""FLUX.1 and its variants: packed tokens of 2 x 2 latent pixels, positions as an argument, timestep = σ.

Fill and Control carry condition channels in every token, Kontext a reference picture's tokens behind the latent's, an
IP-Adapter keys and values of its own in the double blocks. A ControlNet adds one residual per image token after every
block; a coarse token gets the mean of those that it covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn

from ..granularity import Geometry
from ..runtime import TeaCacheDefaults, Trunk
from .base import ModelInputs, NotCoarseError
from .packed import PositionIdFamily, token_means

_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
"""What a ControlNet gives: lists of (B, N, d)."""

TEACACHE = TeaCacheDefaults(
    "flux", 0.4, (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
)  # published for FLUX.1-dev


class Flux(PositionIdFamily):
    name = "flux"
    transformer_class = FluxTransformer2DModel
    pipelines = (
        FluxPipeline,
        FluxImg2ImgPipeline,
        FluxInpaintPipeline,
        FluxKontextPipeline,
        FluxKontextInpaintPipeline,
        FluxFillPipeline,
        FluxControlPipeline,
        FluxControlImg2ImgPipeline,
        FluxControlInpaintPipeline,
        FluxControlNetPipeline,
        FluxControlNetImg2ImgPipeline,
        FluxControlNetInpaintPipeline,
    )
    projection_names = ("x_embedder", "proj_out")
    time_scale = 1.0
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
        r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
        "attention": r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }
    shared_arguments = frozenset({"txt_ids", "img_ids"})

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        call = super().parse(module, arguments)
        tokens = call.geometry.tokens(1)
        for name in _RESIDUALS:
            for residual in arguments.get(name) or ():
                if residual.shape[1] != tokens:
                    raise NotCoarseError(f"{name}: {residual.shape[1]} residuals for {tokens} tokens of the latent")
        return call

    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        placed = super().placed_arguments(call, multiple, native)
        given = {name: call.arguments.get(name) for name in _RESIDUALS}
        pooled = {
            name: [token_means(residual, call.geometry, multiple) for residual in residuals]
            for name, residuals in given.items()
            if residuals is not None
        }
        return {**placed, **pooled}

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        return int(arguments["encoder_hidden_states"].shape[1])

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        negative = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        return negative and call["true_cfg_scale"] > 1

    def trunk(self, module: nn.Module) -> Trunk:
        def signal(arguments: Mapping[str, Any], retention: bool) -> torch.Tensor:
            # the first block's input as its own modulation leaves it
            hidden = module.x_embedder(arguments["hidden_states"])
            times = [arguments["timestep"], arguments.get("guidance")]
            scaled = [time.to(hidden.dtype) * 1000 for time in times if time is not None]
            embedded = module.time_text_embed(*scaled, arguments["pooled_projections"])
            return module.transformer_blocks[0].norm1(hidden, emb=embedded)[0]

        blocks = ("transformer_blocks", "single_transformer_blocks")
        return Trunk(TEACACHE, module.x_embedder, blocks, module.norm_out, lambda tokens: tokens, signal)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        image = geometry.tokens(multiple)
        total = image + text_tokens
        layers = config.num_layers + config.num_single_layers
        # per token 12 d² in both kinds of block: attention 4 d², feed-forward 8 d² (single: 3 + 4 + 5)
        blocks = layers * 12 * width**2 * total
        attention = layers * 2 * total**2 * width
        modulation = (config.num_layers * 12 + config.num_single_layers * 3 + 2) * width**2
        embedders = 2 if config.guidance_embeds else 1
        modulation += embedders * (256 + width) * width + (config.pooled_projection_dim + width) * width
        ends = (
            image * (module.x_embedder.in_features + module.proj_out.out_features) * width
            + text_tokens * config.joint_attention_dim * width
        )
        return 2.0 * (blocks + attention + modulation + ends)
