"""FLUX.1 and its variants: packed tokens of 2 x 2 latent pixels, positions as an argument, timestep = σ.

Fill and Control carry condition channels in every token, Kontext a reference picture's tokens behind the latent's, an
IP-Adapter keys and values of its own in the double blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ..runtime import TeaCacheDefaults, Trunk
from .base import present
from .packed import is_truly_guided
from .streams import TwoStreamFamily

TEACACHE = TeaCacheDefaults(
    "flux", 0.4, (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
)  # published for FLUX.1-dev


class Flux(TwoStreamFamily):
    name = "flux"
    transformer_class = FluxTransformer2DModel
    pipelines = present(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    )

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        return is_truly_guided(call)

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

    def modulation(self, config: Any, width: int) -> float:
        pooled = (config.pooled_projection_dim + width) * width
        guidance = (256 + width) * width if config.guidance_embeds else 0
        return super().modulation(config, width) + pooled + guidance
