"""Wan 2.1 and 2.2: latents (B, C, F, H, W), patches of 1 x 2 x 2, rotary positions made inside, timestep = 1000 σ."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import (
    Geometry,
    PatchEmbedding,
    PatchProjections,
    Scalar,
    bands,
    coarse_centres,
    pad_to_grid,
    patchify,
    swapped,
    unpatchify,
)
from ..runtime import TeaCacheDefaults, Trunk
from .base import Family, ModelInputs, NotCoarseError, raw_sample
from .weights import stored

# published for Wan 2.1 text-to-video, the second polynomial for the variant that computes the first five steps
TEACACHE_1_3B = TeaCacheDefaults(
    "wan-1.3b",
    0.08,
    (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
)
TEACACHE_14B = TeaCacheDefaults(
    "wan-14b",
    0.2,
    (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
)


class Wan(Family):
    name = "wan"
    transformer_class = WanTransformer3DModel
    pipelines = (WanPipeline, WanImageToVideoPipeline)
    components = ("transformer", "transformer_2")
    projection_names = ("patch_embedding", "proj_out")
    time_scale = 1000.0
    distill_optimizer = "adamw"
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        "attention": r"blocks\.\d+\.attn[12]\.(to_[qkv]|add_[kv]_proj|to_out\.0)",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        if arguments["timestep"].ndim != 1:
            raise NotCoarseError("a timestep per token is not supported on coarse tokens")
        hidden = arguments["hidden_states"]
        channels = module.config.out_channels
        latent, condition = hidden[:, :channels], hidden[:, channels:]
        frames, height, width = hidden.shape[2:]
        geometry = Geometry(channels, frames, height, width, module.config.patch_size[1])
        return ModelInputs(
            arguments, latent, condition if condition.shape[1] else None, geometry, self.text_tokens(arguments)
        )

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        image = arguments.get("encoder_hidden_states_image")
        return int(arguments["encoder_hidden_states"].shape[1] + (0 if image is None else image.shape[1]))

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        return bool(call["guidance_scale"] > 1)

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return raw_sample(raw)

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        return Transformer2DModelOutput(sample=prediction) if call.arguments.get("return_dict", True) else (prediction,)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        arguments = _coarse_arguments(call, sigma)
        hidden = low.to(call.latent.dtype)
        if call.condition is not None:
            condition = bands.down(pad_to_grid(call.condition, call.geometry, multiple), multiple)
            hidden = torch.cat([hidden, condition], dim=1)
        return {**arguments, "hidden_states": hidden}

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return raw[0]

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        if native:
            return nullcontext()
        rope = _rope(module, call.geometry, multiple, call.latent.device)
        return swapped(module, rope=lambda _: rope)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = module.patch_embedding, module.proj_out
        return PatchProjections(stored(embed)[:, :, 0], stored(embed, "bias"), stored(deembed), stored(deembed, "bias"))

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
        side = multiple * geometry.patch
        rows, columns = geometry.grid(multiple)
        pixels = latent.to(call.latent.dtype)
        if call.condition is not None:
            pixels = torch.cat([pixels, pad_to_grid(call.condition, geometry, multiple)], dim=1)

        def embed(_: torch.Tensor) -> torch.Tensor:
            # the transformer flattens (B, d, F, rows, columns) to tokens
            tokens = embedding.tokens(patchify(pixels, side))
            return tokens.transpose(1, 2).unflatten(2, (geometry.frames, rows, columns))

        patches: list[torch.Tensor] = []

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            patches.append(embedding.patches(tokens))
            return patches[0]

        # Only the shape of hidden_states reaches the trunk: a latent whose p x p grid is the coarse grid. The
        # transformer's own un-patchify knows p alone, so its result is left aside.
        shape = (pixels.shape[0], 1, geometry.frames, rows * geometry.patch, columns * geometry.patch)
        arguments = {**_coarse_arguments(call, sigma), "hidden_states": pixels.new_empty(shape)}
        with swapped(module, patch_embedding=embed, proj_out=deembed), self.placed(module, call, multiple, native):
            forward(**arguments)
        return unpatchify(patches[0], side, geometry.frames, rows, columns)

    def trunk(self, module: nn.Module) -> Trunk:
        def signal(arguments: Mapping[str, Any], retention: bool) -> torch.Tensor:
            # the time embedding, or its projection to the blocks' modulation
            embedder = module.condition_embedder
            times = embedder.timesteps_proj(arguments["timestep"])
            weight = embedder.time_embedder.linear_1.weight
            embedded = embedder.time_embedder(times.to(weight.dtype))
            return embedder.time_proj(embedder.act_fn(embedded)) if retention else embedded

        width = module.config.num_attention_heads * module.config.attention_head_dim
        model = TEACACHE_14B if width > 3072 else TEACACHE_1_3B  # 5120 and 1536
        return Trunk(
            model, module.patch_embedding, ("blocks",), module.norm_out, lambda grid: grid.flatten(2).mT, signal
        )

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        video = geometry.tokens(multiple)
        # per token: self-attention 4 d², cross-attention query and output 2 d², feed-forward; per text token: 2 d²
        linear = video * (6 * width**2 + 2 * width * config.ffn_dim) + text_tokens * 2 * width**2
        attention = 2 * video * (video + text_tokens) * width
        area = geometry.patch**2
        ends = video * area * (config.in_channels + config.out_channels) * width
        text = text_tokens * (config.text_dim * width + width**2)
        return 2.0 * (config.num_layers * (linear + attention) + ends + text + 7 * width**2)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        config = (pipe.transformer or pipe.transformer_2).config
        space = pipe.vae_scale_factor_spatial
        patch = config.patch_size[1]
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        side = space * patch
        return Geometry(config.out_channels, latent_frames, height // side * patch, width // side * patch, patch)

    def check_pipeline(self, pipe: Any) -> None:
        if pipe.config.get("expand_timesteps"):
            raise UnsupportedPipelineError(
                "Wan 2.2 TI2V-5B gives every token its own timestep (expand_timesteps=True), which coarse tokens "
                "cannot carry yet. Supported: Wan 2.1 text- and image-to-video, Wan 2.2 A14B."
            )
        for name in self.components:
            module = getattr(pipe, name, None)
            size = tuple(module.config.patch_size) if module is not None else (1, 2, 2)
            if size[0] != 1 or size[1] != size[2]:
                raise UnsupportedPipelineError(
                    f"{name} has patch size {size}; coarse patches are defined for (1, p, p)."
                )


def _coarse_arguments(call: ModelInputs, sigma: Scalar) -> dict[str, Any]:
    arguments = dict(call.arguments)
    timestep = arguments["timestep"]
    # σ' of a coarse step lies between the scheduler's (often whole) timesteps
    arguments["timestep"] = bands.noise_level(timestep.float(), sigma * Wan.time_scale)
    arguments["return_dict"] = False
    return arguments


def _rope(
    module: nn.Module, geometry: Geometry, multiple: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cosines and sines (1, N, 1, head dim) at the centres of the coarse patches on the full grid."""
    rope = module.rope
    rows, columns = geometry.grid(multiple)
    axes = (
        (rope.t_dim, torch.arange(geometry.frames, device=device, dtype=torch.float32)),
        (rope.h_dim, coarse_centres(rows, multiple, device)),
        (rope.w_dim, coarse_centres(columns, multiple, device)),
    )
    tables = [
        get_1d_rotary_pos_embed(dim, centres, 10000.0, use_real=True, freqs_dtype=torch.float64)
        for dim, centres in axes
    ]
    shape = (geometry.frames, rows, columns)

    def spread(part: int) -> torch.Tensor:
        views = []
        for axis, table in enumerate(tables):
            view = [1, 1, 1, -1]
            view[axis] = shape[axis]
            views.append(table[part].view(view).expand(*shape, -1))
        return torch.cat(views, dim=-1).reshape(1, -1, 1, sum(dim for dim, _ in axes))

    return spread(0), spread(1)
