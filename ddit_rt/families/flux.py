"""FLUX.1: packed tokens of 2 x 2 latent pixels, positions as an argument, timestep = σ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import nn

from ..granularity import (
    Geometry,
    PatchEmbedding,
    PatchProjections,
    Scalar,
    bands,
    patchify,
    swapped,
    unpatchify,
)
from ..runtime import TeaCacheDefaults, Trunk
from .base import Family, ModelInputs, NotCoarseError, raw_sample
from .weights import stored

TEACACHE = TeaCacheDefaults(
    "flux", 0.4, (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
)  # published for FLUX.1-dev
PATCH = 2  # FluxPipeline packs 2 x 2 latent pixels into a token; the transformer itself sees patch size 1


class Flux(Family):
    name = "flux"
    transformer_class = FluxTransformer2DModel
    pipelines = (FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline)
    projection_names = ("x_embedder", "proj_out")
    time_scale = 1.0
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
        r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
        "attention": r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }
    shared_arguments = frozenset({"txt_ids", "img_ids"})

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if arguments.get(name) is not None:
                raise NotCoarseError(f"{name} has one residual per full token")
        tokens = arguments["hidden_states"]
        rows, columns = _grid(arguments["img_ids"], tokens.shape[1])
        latent = _unpacked(tokens, rows, columns)
        geometry = Geometry(latent.shape[1], 1, rows * PATCH, columns * PATCH, PATCH)
        return ModelInputs(arguments, latent, None, geometry, self.text_tokens(arguments))

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        return int(arguments["encoder_hidden_states"].shape[1])

    def packing(self, geometry: Geometry) -> tuple[int, int] | None:
        return geometry.grid(1)

    def is_guided(self, call: Mapping[str, Any]) -> bool:
        negative = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        return negative and call["true_cfg_scale"] > 1

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return _unpacked(raw_sample(raw), *call.geometry.grid(1))

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        sample = _packed(prediction)
        return Transformer2DModelOutput(sample=sample) if call.arguments.get("return_dict", True) else (sample,)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        hidden = _packed(low).to(call.latent.dtype)
        return {**_coarse_arguments(call, sigma, multiple, native), "hidden_states": hidden}

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return _unpacked(raw[0], *call.geometry.grid(multiple))

    def run_low(
        self,
        module: nn.Module,
        forward: Any,
        call: ModelInputs,
        latent: torch.Tensor,
        sigma: Scalar,
        multiple: int,
        native: bool,
    ) -> torch.Tensor:
        raw = forward(**self.low_arguments(call, latent, sigma, multiple, native))
        return self.low_output(module, call, raw, multiple)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = module.x_embedder, module.proj_out

        def pixel_major(rows: torch.Tensor) -> torch.Tensor:
            # FLUX orders the values of a token (channel, row, column)
            return rearrange(rows, "(c s) ... -> (s c) ...", s=PATCH**2)

        return PatchProjections(
            stored(embed).unflatten(1, (-1, PATCH, PATCH)),
            stored(embed, "bias"),
            pixel_major(stored(deembed)),
            None if deembed.bias is None else pixel_major(stored(deembed, "bias")),
        )

    def run_patches(
        self,
        module: nn.Module,
        forward: Any,
        call: ModelInputs,
        latent: torch.Tensor,
        sigma: Scalar,
        embedding: PatchEmbedding,
        multiple: int,
        native: bool,
    ) -> torch.Tensor:
        arguments = _coarse_arguments(call, sigma, multiple, native)
        arguments["hidden_states"] = patchify(latent, multiple * PATCH).to(call.latent.dtype)
        with swapped(module, x_embedder=embedding.tokens, proj_out=embedding.patches):
            raw = forward(**arguments)
        return unpatchify(raw[0], multiple * PATCH, 1, *call.geometry.grid(multiple))

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

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        image = geometry.tokens(multiple)
        total = image + text_tokens
        layers = config.num_layers + config.num_single_layers
        # per token 12 d² in both kinds of block: attention 4 d², feed-forward 8 d² (single: 3 + 4 + 5)
        blocks = layers * 12 * width**2 * total
        attention = layers * 2 * total**2 * width
        modulation = (config.num_layers * 12 + config.num_single_layers * 3 + 2) * width**2
        ends = image * 2 * config.in_channels * width + text_tokens * config.joint_attention_dim * width
        return 2.0 * (blocks + attention + modulation + ends)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        # FluxPipeline.prepare_latents: compressed by the VAE, then made even for packing
        side = pipe.vae_scale_factor * PATCH
        channels = pipe.transformer.config.in_channels // PATCH**2
        return Geometry(channels, 1, height // side * PATCH, width // side * PATCH, PATCH)


def _unpacked(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(B, rows·columns, C·2·2) as FluxPipeline packs them -> (B, C, 1, 2·rows, 2·columns)."""
    layout = "b (h w) (c p q) -> b c 1 (h p) (w q)"
    return rearrange(tokens, layout, h=rows, w=columns, p=PATCH, q=PATCH)


def _packed(latent: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_unpacked`."""
    return rearrange(latent, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def _coarse_arguments(call: ModelInputs, sigma: Scalar, multiple: int, native: bool) -> dict[str, Any]:
    arguments = dict(call.arguments)
    arguments["timestep"] = bands.noise_level(arguments["timestep"], sigma)
    arguments["img_ids"] = _coarse_ids(arguments["img_ids"], *call.geometry.grid(multiple), multiple, native)
    arguments["return_dict"] = False
    if arguments.get("joint_attention_kwargs") is not None:
        # the transformer pops entries from it, and one step may call it more than once
        arguments["joint_attention_kwargs"] = dict(arguments["joint_attention_kwargs"])
    return arguments


def _coarse_ids(full: torch.Tensor, rows: int, columns: int, multiple: int, native: bool) -> torch.Tensor:
    """(rows·columns, 3) position ids (0, row, column), dtype and device of the full ones; float32 if fractional."""
    spread = 1 if native else multiple
    dtype = full.dtype if native else torch.float32
    # the centre of the full patches that a coarse one covers
    row, column = (
        torch.arange(count, device=full.device, dtype=torch.float32) * spread + (spread - 1) / 2
        for count in (rows, columns)
    )
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1).to(dtype)


def _grid(img_ids: torch.Tensor, tokens: int) -> tuple[int, int]:
    """StepExecutor and columns of the token grid; read once per ids tensor, since it waits for the device."""
    known = getattr(img_ids, "_ddit_grid", None)
    if known is None:
        ids = img_ids[0] if img_ids.ndim == 3 else img_ids
        kind, rows, columns = (int(value) + 1 for value in ids.amax(dim=0).tolist())
        if kind != 1 or rows * columns != tokens:
            raise NotCoarseError(
                f"img_ids describe no plain grid of {tokens} tokens (reference images in the sequence?)"
            )
        known = (rows, columns)
        img_ids._ddit_grid = known  # type: ignore[attr-defined]
    return known
