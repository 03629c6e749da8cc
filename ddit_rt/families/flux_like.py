"""FLUX's kin: Chroma, LongCat-Image and Ovis-Image, which have its blocks, and Krea 2, which has its tokens.

All take the noise level σ as ``timestep`` and guide by two calls. Ids of LongCat-Image's picture begin behind the
longest text's, those of the others at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import Geometry, swapped
from .base import ModelInputs
from .packed import PATCH, PositionIdFamily
from .streams import TwoStreamFamily

NO_FIRST_BLOCK_CACHE = "diffusers 0.42's FirstBlockCache does not know this transformer's blocks"


class Chroma(TwoStreamFamily):
    """A mask hides the text's padding; it has one value per token of text and picture."""

    name = "chroma"
    transformer_class = ChromaTransformer2DModel
    pipelines = (ChromaPipeline, ChromaImg2ImgPipeline, ChromaInpaintPipeline)
    limits: ClassVar[dict[str, str]] = {"first-block cache": NO_FIRST_BLOCK_CACHE}

    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        placed = super().placed_arguments(call, multiple, native)
        mask = call.arguments.get("attention_mask")
        if mask is not None:
            # the picture's part is all ones in every pipeline; a coarse token has its first token's value
            text, sides = self.text_tokens(call.arguments), call.geometry.grid(1)
            rows, columns = (
                (torch.arange(count, device=mask.device) * multiple).clamp(max=side - 1)
                for count, side in zip(call.geometry.grid(multiple), sides)
            )
            picture = mask[:, text:].unflatten(1, sides)[:, rows[:, None], columns]
            placed["attention_mask"] = torch.cat([mask[:, :text], picture.flatten(1)], dim=1)
        return placed

    def capturable(self, module: nn.Module) -> AbstractContextManager[None]:
        embed: Any = module.get_submodule("time_text_embed")

        def embedded(timestep: torch.Tensor) -> torch.Tensor:
            # the class's own makes the guidance, which is none, on the host
            none = torch.zeros_like(timestep, dtype=torch.int64)
            times = [embed.time_proj(timestep), embed.guidance_proj(none)]
            level = torch.cat([time.to(timestep.dtype) for time in times], dim=1)
            rows = embed.mod_proj.to(level)
            shape = (len(level), len(rows), -1)
            return torch.cat([level[:, None].expand(shape), rows.expand(shape)], dim=-1)

        return swapped(module, time_text_embed=embedded)

    def modulation(self, config: Any, width: int) -> float:
        # a network beside the blocks makes all modulations, a row each, from the noise level and the row's number
        rows = config.num_layers * 12 + config.num_single_layers * 3 + 2
        hidden = config.approximator_hidden_dim
        layers = config.approximator_num_channels + 2 * config.approximator_layers * hidden + width
        return float(rows * hidden * layers)


class LongCatImage(TwoStreamFamily):
    """Editing has the picture to be edited at the new one's places, told apart by the first id alone."""

    name = "longcat-image"
    transformer_class = LongCatImageTransformer2DModel
    pipelines = (LongCatImagePipeline, LongCatImageEditPipeline)
    limits: ClassVar[dict[str, str]] = {"first-block cache": NO_FIRST_BLOCK_CACHE}
    references_share_grid = True


class OvisImage(TwoStreamFamily):
    name = "ovis-image"
    transformer_class = OvisImageTransformer2DModel
    pipelines = (OvisImagePipeline,)
    limits: ClassVar[dict[str, str]] = {"first-block cache": NO_FIRST_BLOCK_CACHE}
    gated = True


class Krea2(PositionIdFamily):
    """One stream of text and picture; the text's ids are in the same tensor, before the picture's."""

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

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        return int(arguments["encoder_hidden_states"].shape[1])

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
