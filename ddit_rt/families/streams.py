"""Transformers of FLUX's two kinds of block: double-stream ones, where text and picture have weights of their own and
attend to each other, then single-stream ones for both, with attention and feed-forward side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..granularity import Geometry
from .base import ModelInputs
from .control import check_residuals, coarse_residuals
from .packed import PositionIdFamily

_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
"""What a ControlNet gives."""


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
        controlled = _is_controlled(arguments)
        call = super().parse(module, arguments)
        if controlled:
            check_residuals(arguments, call.geometry, *_RESIDUALS)
        return call

    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        controlled = _is_controlled(call.arguments)
        placed = super().placed_arguments(call, multiple, native)
        if controlled:
            placed |= coarse_residuals(call, multiple, *_RESIDUALS)
        return placed

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


def _is_controlled(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in _RESIDUALS)
