"""Stable Diffusion 3 and 3.5: latents (B, C, H, W), a table of positions cropped from its centre, timestep = 1000 σ.

Guidance joins both prompts in one batch. Skip-layer guidance calls the transformer a second time, for some steps only.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import (
    Geometry,
    PatchEmbedding,
    PatchProjections,
    Scalar,
    bands,
    pad_to_grid,
    patchify,
    swapped,
    unpatchify,
)
from .base import Family, ModelInputs, NotCoarseError, raw_sample
from .weights import kept, stored

_TIME_CHANNELS = 256  # of the sinusoids that the embedding of the timestep begins with


class SD3(Family):
    name = "sd3"
    transformer_class = SD3Transformer2DModel
    pipelines = (
        StableDiffusion3Pipeline,
        StableDiffusion3Img2ImgPipeline,
        StableDiffusion3InpaintPipeline,
        StableDiffusion3ControlNetPipeline,
        StableDiffusion3ControlNetInpaintingPipeline,
    )
    projection_names = ("pos_embed.proj", "proj_out")
    time_scale = 1000.0
    limits: ClassVar[dict[str, str]] = {"first-block cache": "diffusers has no caches for SD3Transformer2DModel"}
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        "attention": r"transformer_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        if arguments.get("block_controlnet_hidden_states") is not None:
            raise NotCoarseError("block_controlnet_hidden_states has one residual per full token")
        hidden = arguments["hidden_states"].unsqueeze(2)
        channels, patch = module.config.out_channels, module.config.patch_size
        condition = hidden[:, channels:] if hidden.shape[1] > channels else None
        geometry = Geometry(channels, 1, hidden.shape[3], hidden.shape[4], patch)
        return ModelInputs(arguments, hidden[:, :channels], condition, geometry, self.text_tokens(arguments))

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        return int(arguments["encoder_hidden_states"].shape[1])

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        return bool(call["guidance_scale"] > 1)

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return raw_sample(raw).unsqueeze(2)

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        sample = prediction[:, :, 0]
        return Transformer2DModelOutput(sample=sample) if call.arguments.get("return_dict", True) else (sample,)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        hidden = low.to(call.latent.dtype)
        if call.condition is not None:
            condition = bands.down(pad_to_grid(call.condition, call.geometry, multiple), multiple)
            hidden = torch.cat([hidden, condition], dim=1)
        return {**_coarse_arguments(call, sigma), "hidden_states": hidden[:, :, 0]}

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return raw[0].unsqueeze(2)

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        if native:
            return nullcontext()
        embedding = module.pos_embed
        centres = centred_positions(embedding, call.geometry, multiple).to(call.latent.device)

        def embed(latent: torch.Tensor) -> torch.Tensor:
            tokens = embedding.proj(latent).flatten(2).mT
            return (tokens + centres).to(tokens.dtype)

        return swapped(module, pos_embed=embed)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = module.pos_embed.proj, module.proj_out
        return PatchProjections(stored(embed), stored(embed, "bias"), stored(deembed), stored(deembed, "bias"))

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
        geometry = call.geometry
        side, patch = multiple * geometry.patch, geometry.patch
        rows, columns = geometry.grid(multiple)
        pixels = latent.to(call.latent.dtype)
        if call.condition is not None:
            pixels = torch.cat([pixels, pad_to_grid(call.condition, geometry, multiple)], dim=1)

        def embed(_: torch.Tensor) -> torch.Tensor:
            return embedding.tokens(patchify(pixels, side)).mT.unflatten(2, (rows, columns))

        patches: list[torch.Tensor] = []

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            patches.append(embedding.patches(tokens))
            return tokens.new_empty(*tokens.shape[:2], patch**2 * geometry.channels)

        # Only the shape of hidden_states reaches the trunk: a latent whose p x p grid is the coarse grid. The
        # transformer's own un-patchify knows p alone, so its result is left aside.
        arguments = _coarse_arguments(call, sigma)
        arguments["hidden_states"] = pixels.new_empty(pixels.shape[0], 1, rows * patch, columns * patch)
        ends = {"pos_embed.proj": embed, "proj_out": deembed}
        with swapped(module, **ends), self.placed(module, call, multiple, native):
            forward(**arguments)
        return unpatchify(patches[0], side, 1, rows, columns)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        # layers that skip-layer guidance leaves out, and tokens of an IP-adapter's picture, are not looked at
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        image, layers, dual = geometry.tokens(multiple), config.num_layers, len(config.dual_attention_layers)
        # per token and block: attention 4 d², feed-forward 8 d²; the last block makes nothing of the text but keys and
        # values, and queries that come to nothing
        linear = (layers * 12 * image + ((layers - 1) * 12 + 3) * text_tokens) * width**2
        attention = layers * 2 * (image + text_tokens) ** 2 * width
        second = dual * (4 * image * width**2 + 2 * image**2 * width)
        modulation = (layers * 6 + dual * 3 + (layers - 1) * 6 + 2 + 2) * width**2
        embedded = (_TIME_CHANNELS + config.pooled_projection_dim) * width + 2 * width**2
        ends = image * geometry.patch**2 * (config.in_channels + config.out_channels) * width
        text = text_tokens * config.joint_attention_dim * config.caption_projection_dim
        return 2.0 * (linear + attention + second + modulation + embedded + ends + text)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        config = pipe.transformer.config
        patch = config.patch_size
        side = pipe.vae_scale_factor * patch
        return Geometry(config.out_channels, 1, height // side * patch, width // side * patch, patch)

    def check_pipeline(self, pipe: Any) -> None:
        if not pipe.transformer.config.pos_embed_max_size:
            raise UnsupportedPipelineError(
                "the transformer has no table of positions to crop from (pos_embed_max_size is not set), which every "
                "published Stable Diffusion 3 has: load it with its own configuration."
            )


def centred_positions(embedding: nn.Module, geometry: Geometry, multiple: int) -> torch.Tensor:
    """Position embeddings of coarse tokens at the centres of the full patches that each covers.

    The table's quarters hold sines and cosines of frequencies times the row, then of frequencies times the column. The
    mean of such pairs over neighbouring rows points to the angle of their centre, and is shorter. Brought back to the
    length that the pairs have, it is exact whatever the table's frequencies are; the plain mean is not.

    Args:
        embedding: The transformer's ``pos_embed``.
        geometry: Of the full latent.
        multiple: k.

    Returns:
        float32 (1, N, d), where the table is kept.
    """
    table, size = kept(embedding, "pos_embed"), embedding.pos_embed_max_size
    grid = table.float().reshape(size, size, 4, -1)
    taken = []
    for full, coarse in zip(geometry.grid(1), geometry.grid(multiple)):
        places = (size - full) // 2 + torch.arange(coarse * multiple, device=table.device)
        taken.append(places.clamp(max=size - 1))  # what pads the grid may lie beyond the table
    layout = "(h k) (w l) (a pair) frequency -> h w (k l) a pair frequency"
    pairs = rearrange(grid[taken[0]][:, taken[1]], layout, k=multiple, l=multiple, pair=2)
    mean, length = pairs.mean(2), pairs.norm(dim=-2, keepdim=True).mean(2)
    placed = mean * (length / mean.norm(dim=-2, keepdim=True).clamp_min(1e-12))
    return placed.flatten(2).flatten(0, 1)[None]


def _coarse_arguments(call: ModelInputs, sigma: Scalar) -> dict[str, Any]:
    # a transformer may pop entries from a dictionary it is given, and one step may call it more than once
    arguments: dict[str, Any] = {n: dict(a) if isinstance(a, dict) else a for n, a in call.arguments.items()}
    # σ' of a coarse step lies between the scheduler's timesteps
    arguments["timestep"] = bands.noise_level(arguments["timestep"].float(), sigma * SD3.time_scale)
    arguments["return_dict"] = False
    return arguments
