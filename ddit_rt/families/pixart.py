"""PixArt-α and -Σ (arXiv 2310.00426, 2403.04692): DiT with text by cross-attention; α at 1024 is told the size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn

from ..granularity import Geometry
from .base import ModelInputs, NotCoarseError
from .patch_embed import NO_FIT, TIME_CHANNELS, NoisePredictingFamily


class PixArt(NoisePredictingFamily):
    name = "pixart"
    transformer_class = PixArtTransformer2DModel
    pipelines = (PixArtAlphaPipeline, PixArtSigmaPipeline)
    projection_names = ("pos_embed.proj", "proj_out")
    limits: ClassVar[dict[str, str]] = {
        "fit": NO_FIT,
        "LoRA": "diffusers' PixArtTransformer2DModel takes no LoRA",
        "first-block cache": "diffusers has no caches for PixArtTransformer2DModel",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        if arguments.get("attention_mask") is not None:
            raise NotCoarseError("attention_mask has one value per full token")
        return super().parse(module, arguments)

    def conditions(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        """A smaller picture is told its own size; interpolated positions are those of the full picture, and so is what
        it is told."""
        told: Mapping[str, Any] | None = call.arguments.get("added_cond_kwargs")
        if not native or told is None or told["resolution"] is None:
            return {"added_cond_kwargs": told}
        geometry = call.geometry
        rows, columns = (side * geometry.patch for side in geometry.grid(multiple))
        tall, wide = rows / geometry.height, columns / geometry.width
        resolution = told["resolution"].clone()
        resolution[:, 0] *= tall
        resolution[:, 1] *= wide
        return {"added_cond_kwargs": {"resolution": resolution, "aspect_ratio": told["aspect_ratio"] * (tall / wide)}}

    def conditioning_flops(self, module: nn.Module, tokens: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        text = config.cross_attention_dim or width
        # cross-attention: query and output of the picture, key and value of the text
        crossed = 2 * tokens * width**2 + 2 * text_tokens * text * width + 2 * tokens * text_tokens * width
        once = TIME_CHANNELS * width + width**2 + 6 * width**2
        if module.use_additional_conditions:
            once += 3 * (TIME_CHANNELS * (width // 3) + (width // 3) ** 2)  # height, width and their ratio
        if config.caption_channels is not None:
            once += text_tokens * (config.caption_channels * width + width**2)
        return float(config.num_layers * crossed + once)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        """Of the size that the pipeline makes; unless told otherwise, it first goes over to the nearest size of its
        training (``use_resolution_binning``)."""
        config, scale = pipe.transformer.config, pipe.vae_scale_factor
        return Geometry(config.in_channels, 1, height // scale, width // scale, config.patch_size)
