"""Wan 2.1 and 2.2: latents (B, C, F, H, W), patches of 1 x 2 x 2, rotary positions made inside, timestep = 1000 σ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import Geometry, coarse_centres
from ..runtime import TeaCacheDefaults, Trunk
from .base import ModelInputs, NotCoarseError
from .grid import GridFamily, Rotary, spread

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


class Wan(GridFamily):
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
        return super().parse(module, arguments)

    def patch(self, config: Any) -> int:
        return int(config.patch_size[1])

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        image = arguments.get("encoder_hidden_states_image")
        return int(arguments["encoder_hidden_states"].shape[1] + (0 if image is None else image.shape[1]))

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        return bool(call["guidance_scale"] > 1)

    def centred_rope(self, module: nn.Module, geometry: Geometry, multiple: int, device: torch.device) -> Rotary:
        return _rope(module, geometry, multiple, device)

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


def _rope(module: nn.Module, geometry: Geometry, multiple: int, device: torch.device) -> Rotary:
    """Rotary cosines and sines (1, N, 1, head dim) at the centres of the coarse patches on the full grid."""
    rope = module.rope
    rows, columns = geometry.grid(multiple)
    axes = (
        (rope.t_dim, torch.arange(geometry.frames, device=device, dtype=torch.float32)),
        (rope.h_dim, coarse_centres(rows, multiple, device)),
        (rope.w_dim, coarse_centres(columns, multiple, device)),
    )
    cosines, sines = spread(
        [
            get_1d_rotary_pos_embed(dim, centres, 10000.0, use_real=True, freqs_dtype=torch.float64)
            for dim, centres in axes
        ]
    )
    return cosines[None, :, None], sines[None, :, None]
