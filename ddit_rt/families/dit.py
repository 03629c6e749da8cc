"""DiT (arXiv 2212.09748): square latents of one size, conditioned on classes; timestep = index of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import nn

from ..granularity import Geometry
from .patch_embed import NO_FIT, TIME_CHANNELS, NoisePredictingFamily


class DiT(NoisePredictingFamily):
    name = "dit"
    transformer_class = DiTTransformer2DModel
    pipelines = (DiTPipeline,)
    projection_names = ("pos_embed.proj", "proj_out_2")
    limits: ClassVar[dict[str, str]] = {
        "fit": NO_FIT,
        "LoRA": "diffusers' DiTTransformer2DModel takes no LoRA",
        "group offload": "diffusers does not offload DiTTransformer2DModel by groups",
        "first-block cache": "diffusers has no caches for DiTTransformer2DModel",
    }

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        return 0

    def conditioning_flops(self, module: nn.Module, tokens: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        embedded = TIME_CHANNELS * width + width**2  # of the timestep, by every block for itself and once at the end
        return float(config.num_layers * (embedded + 6 * width**2) + embedded + 2 * width**2)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        """The one grid that the pipeline makes, whatever is asked for."""
        config = pipe.transformer.config
        return Geometry(config.in_channels, 1, config.sample_size, config.sample_size, config.patch_size)
