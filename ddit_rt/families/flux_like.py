"""Chroma, LongCat-Image and Ovis-Image, which have FLUX's tokens and blocks and guide by two calls.

Ids of LongCat-Image's picture begin behind the longest text's, those of the others at zero.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from torch import nn

from ..granularity import swapped
from .base import ModelInputs
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
