"""Krea 2: FLUX's tokens in one stream with the text's, positions of both in one argument, timestep = σ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import Geometry
from .packed import PATCH, PositionIdFamily


class Krea2(PositionIdFamily):
    name = "krea2"
    transformer_class = Krea2Transformer2DModel
    pipelines = (Krea2Pipeline,)
    projection_names = ("img_in", "final_layer.linear")
    time_scale = 1.0
    ids_argument = "position_ids"
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff\.(gate|up|down)",
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_gate|to_out\.0)",
    }
    shared_arguments = frozenset({"position_ids"})
    limits: ClassVar[dict[str, str]] = {"first-block cache": "diffusers 0.42 has no caches for this transformer"}

    def leading_ids(self, arguments: Mapping[str, Any]) -> int:
        return self.text_tokens(arguments)

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        # the scale counts from the conditional prediction, not from the unconditional one
        return bool(call["guidance_scale"] > 0)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        keys = config.num_key_value_heads * config.attention_head_dim
        image = geometry.tokens(multiple)
        total = image + text_tokens
        # query, gate and output, keys and values, and the gated feed-forward
        layer = _layer_macs(width, keys, config.intermediate_size)
        blocks = config.num_layers * (layer * total + 2 * total**2 * width)
        ends = image * 2 * config.in_channels * width
        times = (config.timestep_embed_dim + 7 * width) * width
        return 2.0 * (blocks + ends + times + self._text(config, width, text_tokens))

    def _text(self, config: Any, width: int, tokens: int) -> float:
        """Multiply-adds of what makes the text's tokens from the text encoder's layers."""
        inner, depth = config.text_hidden_dim, config.num_text_layers
        keys = inner // config.text_num_attention_heads * config.text_num_key_value_heads
        layer = _layer_macs(inner, keys, config.text_intermediate_size)
        # across the layers for every token, then across the tokens
        across = config.num_layerwise_text_blocks * tokens * (depth * layer + 2 * depth**2 * inner)
        along = config.num_refiner_text_blocks * (tokens * layer + 2 * tokens**2 * inner)
        return float(across + along + tokens * (inner * depth + inner * width + width**2))

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        # rounded up, unlike in FLUX
        side = pipe.vae_scale_factor * PATCH
        return super().geometry(pipe, -(-height // side) * side, -(-width // side) * side, frames)

    def check_pipeline(self, pipe: Any) -> None:
        if pipe.patch_size != PATCH:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} packs patches of side {pipe.patch_size}: only {PATCH} is supported."
            )


def _layer_macs(width: int, keys: int, hidden: int) -> int:
    """Multiply-adds per token of a Krea 2 block's linear layers: attention with ``keys`` values each for key and value,
    a gated feed-forward of ``hidden``."""
    return 3 * width**2 + 2 * width * keys + 3 * width * hidden
