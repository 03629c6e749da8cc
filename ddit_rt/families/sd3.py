"""Stable Diffusion 3 and 3.5: latents (B, C, H, W), a table of positions cropped from its centre, timestep = 1000 σ.

Guidance joins both prompts in one batch. Skip-layer guidance calls the transformer a second time, for some steps only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from einops import rearrange
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import Geometry
from .base import ModelInputs
from .control import check_residuals, coarse_residuals
from .patch_embed import TIME_CHANNELS, PatchEmbedFamily, out_channels
from .weights import kept

_RESIDUALS = "block_controlnet_hidden_states"
"""What a ControlNet gives."""


class SD3(PatchEmbedFamily):
    name = "sd3"
    transformer_class = SD3Transformer2DModel
    pipelines = (
        StableDiffusion3Pipeline,
        StableDiffusion3Img2ImgPipeline,
        StableDiffusion3InpaintPipeline,
        StableDiffusion3ControlNetPipeline,
        StableDiffusion3ControlNetInpaintingPipeline,
    )
    projection_names = ("pos_embed.proj", "proj_out")
    limits: ClassVar[dict[str, str]] = {"first-block cache": "diffusers has no caches for SD3Transformer2DModel"}
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        "attention": r"transformer_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        call = super().parse(module, arguments)
        check_residuals(arguments, call.geometry, _RESIDUALS)
        return call

    def conditions(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        return coarse_residuals(call, multiple, _RESIDUALS)

    def channels(self, module: nn.Module) -> int:
        return out_channels(module)

    def centres(self, module: nn.Module, call: ModelInputs, multiple: int) -> torch.Tensor:
        return centred_positions(module.pos_embed, call.geometry, multiple).to(call.latent.device)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        # layers that skip-layer guidance leaves out, and tokens of an IP-adapter's picture, are not looked at
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        image, layers, dual = geometry.tokens(multiple), config.num_layers, len(config.dual_attention_layers)
        # per token and block: attention 4 d², feed-forward 8 d²; the last block makes nothing of the text but keys and
        # values, and queries that come to nothing
        linear = (layers * 12 * image + ((layers - 1) * 12 + 3) * text_tokens) * width**2
        attention = layers * 2 * (image + text_tokens) ** 2 * width
        second = dual * (4 * image * width**2 + 2 * image**2 * width)
        modulation = (layers * 6 + dual * 3 + (layers - 1) * 6 + 2 + 2) * width**2
        embedded = (TIME_CHANNELS + config.pooled_projection_dim) * width + 2 * width**2
        ends = image * geometry.patch**2 * (config.in_channels + config.out_channels) * width
        text = text_tokens * config.joint_attention_dim * config.caption_projection_dim
        return 2.0 * (linear + attention + second + modulation + embedded + ends + text)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        config = pipe.transformer.config
        patch = config.patch_size
        side = pipe.vae_scale_factor * patch
        return Geometry(config.out_channels, 1, height // side * patch, width // side * patch, patch)

    def check_pipeline(self, pipe: Any) -> None:
        if not pipe.transformer.config.pos_embed_max_size:
            raise UnsupportedPipelineError(
                "the transformer has no table of positions to crop from (pos_embed_max_size is not set), which every "
                "published Stable Diffusion 3 has: load it with its own configuration."
            )


def centred_positions(embedding: nn.Module, geometry: Geometry, multiple: int) -> torch.Tensor:
    """Position embeddings of coarse tokens at the centres of the full patches that each covers.

    The table's quarters hold sines and cosines of frequencies times the row, then of frequencies times the column. The
    mean of such pairs over neighbouring rows points to the angle of their centre, and is shorter. Brought back to the
    length that the pairs have, it is exact whatever the table's frequencies are; the plain mean is not.

    Args:
        embedding: The transformer's ``pos_embed``.
        geometry: Of the full latent.
        multiple: k.

    Returns:
        float32 (1, N, d), where the table is kept.
    """
    table, size = kept(embedding, "pos_embed"), embedding.pos_embed_max_size
    grid = table.float().reshape(size, size, 4, -1)
    taken = []
    for full, coarse in zip(geometry.grid(1), geometry.grid(multiple)):
        places = (size - full) // 2 + torch.arange(coarse * multiple, device=table.device)
        taken.append(places.clamp(max=size - 1))  # what pads the grid may lie beyond the table
    layout = "(h k) (w l) (a pair) frequency -> h w (k l) a pair frequency"
    pairs = rearrange(grid[taken[0]][:, taken[1]], layout, k=multiple, l=multiple, pair=2)
    mean, length = pairs.mean(2), pairs.norm(dim=-2, keepdim=True).mean(2)
    placed = mean * (length / mean.norm(dim=-2, keepdim=True).clamp_min(1e-12))
    return placed.flatten(2).flatten(0, 1)[None]
