"""Transformers of FLUX's two kinds of block: double-stream ones, where text and picture have weights of their own and
attend to each other, then single-stream ones for both, with attention and feed-forward side by side.

A ControlNet adds one residual per token of the picture after every block; a coarse token gets the mean of those that it
covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..granularity import Geometry
from .base import ModelInputs, NotCoarseError
from .packed import PositionIdFamily, token_means

_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
"""What a ControlNet gives: lists of (B, N, d)."""


class TwoStreamFamily(PositionIdFamily):
    """Layers are named as in FLUX.1, and the timestep is σ."""

    projection_names = ("x_embedder", "proj_out")
    time_scale = 1.0
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
        r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
        "attention": r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }
    shared_arguments = frozenset({"txt_ids", "img_ids"})
    gated: ClassVar[bool] = False
    """Whether the feed-forward layers have a gate beside what it multiplies."""

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        call = super().parse(module, arguments)
        tokens = call.geometry.tokens(1)
        for name in _RESIDUALS:
            for residual in arguments.get(name) or ():
                if residual.shape[1] != tokens:
                    raise NotCoarseError(f"{name}: {residual.shape[1]} residuals for {tokens} tokens of the latent")
        return call

    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        given = {name: call.arguments.get(name) for name in _RESIDUALS}
        pooled = {
            name: [token_means(residual, call.geometry, multiple) for residual in residuals]
            for name, residuals in given.items()
            if residuals is not None
        }
        return {**super().placed_arguments(call, multiple, native), **pooled}

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        image = geometry.tokens(multiple)
        total = image + text_tokens
        layers = config.num_layers + config.num_single_layers
        # per token in both kinds of block: attention 4 d², feed-forward 8 d² (single: 3 + 4 + 5), gated 12 d²
        blocks = layers * (16 if self.gated else 12) * width**2 * total
        attention = layers * 2 * total**2 * width
        ends = image * (module.x_embedder.in_features + module.proj_out.out_features) * width  # type: ignore[operator]
        ends += text_tokens * config.joint_attention_dim * width
        return 2.0 * (blocks + attention + ends + self.modulation(config, width))

    def modulation(self, config: Any, width: int) -> float:
        """Multiply-adds per sample of all that turns noise level and the like into modulations of width ``width``."""
        return (config.num_layers * 12 + config.num_single_layers * 3 + 2) * width**2 + (256 + width) * width
