"""FLUX.1 and its variants: packed tokens of 2 x 2 latent pixels, positions as an argument, timestep = σ.

Fill and Control carry condition channels in every token, Kontext a reference picture's tokens behind the latent's, an
IP-Adapter keys and values of its own in the double blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ..runtime import TeaCacheDefaults, Trunk
from .base import ModelInputs, present
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
    modular = ("FluxModularPipeline",)
    modulation_inputs = ("pooled_projections", "guidance")
    attends_unmasked = True
    trims_text = True

    def told_times(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # rounded before it is divided, as the pipelines do
        return timesteps.to(dtype) / 1000

    def modulations(
        self, module: nn.Module, arguments: Mapping[str, Any], times: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        model: Any = module
        (count, batch), dtype = times.shape, arguments["hidden_states"].dtype
        guidance, pooled = arguments.get("guidance"), arguments["pooled_projections"]
        scaled = [times.flatten().to(dtype) * 1000]
        if guidance is not None:
            scaled.append((guidance.to(dtype) * 1000).expand(batch).repeat(count))
        embedded = model.time_text_embed(*scaled, pooled.expand(batch, -1).repeat(count, 1))
        layers = {
            f"{blocks}.{index}.{name}.linear": getattr(block, name)
            for blocks, names in (
                ("transformer_blocks", ("norm1", "norm1_context")),
                ("single_transformer_blocks", ("norm",)),
            )
            for index, block in enumerate(getattr(model, blocks))
            for name in names
        }
        layers["norm_out.linear"] = model.norm_out
        activated = model.norm_out.silu(embedded)
        return {"time_text_embed": embedded, **{path: norm.linear(activated) for path, norm in layers.items()}}

    def text_in_prompt(self, pipe: Any, call: Mapping[str, Any]) -> int | None:
        tokenizer = getattr(pipe, "tokenizer_2", None)
        kinds = ["prompt", "negative_prompt"] if is_truly_guided(call) else ["prompt"]
        prompts: list[Any] = [call.get(f"{kind}_2") or call.get(kind) for kind in kinds]
        if tokenizer is None or any(prompt is None for prompt in prompts):
            return None
        texts = [text for prompt in prompts for text in ([prompt] if isinstance(prompt, str) else prompt)]
        if hasattr(pipe, "maybe_convert_prompt"):  # the token of a textual inversion stands for one per vector
            texts = pipe.maybe_convert_prompt(texts, tokenizer)
        found = tokenizer(texts, truncation=True, max_length=call.get("max_sequence_length") or 512)
        return max(map(len, found.input_ids))

    def trimmed(self, call: ModelInputs, tokens: int) -> ModelInputs:
        arguments = dict(call.arguments)
        text, ids = arguments["encoder_hidden_states"], arguments["txt_ids"]
        arguments["encoder_hidden_states"], arguments["txt_ids"] = text[:, :tokens], ids[..., :tokens, :]
        fewer = text.shape[1] - arguments["encoder_hidden_states"].shape[1]
        return replace(call, arguments=arguments, text_tokens=call.text_tokens - fewer)

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
