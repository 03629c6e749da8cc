"""Wan 2.1 and 2.2: latents (B, C, F, H, W), patches of 1 x 2 x 2, rotary positions made inside, timestep = 1000 σ.

TI2V-5B is told a timestep per token. From a picture it makes the first latent frame clean: its tokens have timestep 0,
and what the model predicts there is thrown away. Coarse steps give it the means of the clean frame as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel, WanVideoToVideoPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from ..errors import ConfigError, UnsupportedPipelineError
from ..granularity import Geometry, NotFusedError, OwnEnds, Scalar, bands, coarse_centres
from ..multiples import ALL_MULTIPLES, frames_of, side_of
from ..runtime import TeaCacheDefaults, Trunk
from .base import ModelInputs, NotCoarseError
from .grid import GridFamily, Resize, Rotary, spread

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
    pipelines: ClassVar[tuple[type, ...]] = (WanPipeline, WanImageToVideoPipeline, WanVideoToVideoPipeline)
    components: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    projection_names = ("patch_embedding", "proj_out")
    time_scale = 1000.0
    multiples: ClassVar[tuple[int, ...]] = ALL_MULTIPLES
    distill_optimizer = "adamw"
    attends_unmasked = True
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        "attention": r"blocks\.\d+\.attn[12]\.(to_[qkv]|add_[kv]_proj|to_out\.0)",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        call = super().parse(module, arguments)
        if arguments["timestep"].ndim == 2:
            _check_times(_frame_times(arguments["timestep"], call.geometry))
        return call

    def obstacle(self, call: ModelInputs, multiple: int) -> str:
        if frames_of(multiple) == 1:
            return ""
        if call.geometry.frames == 1:
            return "a single latent frame has none beside it"
        if call.condition is not None or call.arguments["timestep"].ndim == 2:
            return "frames that are given and frames that are made would share a patch"
        return ""

    def patch(self, config: Any) -> int:
        return int(config.patch_size[1])

    def told_time(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        # the first tokens may be those of a clean frame
        times: torch.Tensor = arguments["timestep"]
        return times[0].amax()

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        text, image = arguments["encoder_hidden_states"], arguments.get("encoder_hidden_states_image")
        # a first and a last picture lie behind each other in the batch
        return int(text.shape[1] + (0 if image is None else image.shape[0] * image.shape[1] // text.shape[0]))

    def coarse_time(self, call: ModelInputs, sigma: Scalar, multiple: int) -> torch.Tensor:
        times = call.arguments["timestep"]
        if times.ndim == 1:
            return super().coarse_time(call, sigma, multiple)
        rows, columns = call.geometry.grid(multiple)
        noisy = _frame_times(times, call.geometry)[:, :, :1] > 0
        level = bands.noise_level(times[:, 0].float(), self.time_of(sigma))
        # repeat_interleave may wait for the device, which a captured graph must not
        return (noisy * level[:, None, None]).expand(-1, -1, rows * columns).flatten(1)

    def coarse_latent(self, call: ModelInputs, latent: torch.Tensor, resized: Resize) -> torch.Tensor:
        # Frames without noise stay as they are; the others are a flow-matching state of another scale. Further channels
        # than the latent's are an adapter's.
        if call.arguments["timestep"].ndim != 2:
            return latent
        noisy = _frame_times(call.arguments["timestep"], call.geometry)[:, None, :, :1, None] > 0
        channels = call.geometry.channels
        clean = resized(call.latent)
        return torch.cat([torch.where(noisy, latent[:, :channels], clean), latent[:, channels:]], dim=1)

    def own_ends(self, module: nn.Module, call: ModelInputs) -> OwnEnds:
        if call.arguments["timestep"].ndim == 2:
            raise NotFusedError("frames without noise are read at another scale than the others")
        return super().own_ends(module, call)

    def centred_rope(self, module: nn.Module, geometry: Geometry, multiple: int, device: torch.device) -> Rotary:
        return _rope(module, geometry, multiple, device)

    def trunk(self, module: nn.Module) -> Trunk:
        if _has_time_per_token(module.config):
            raise ConfigError(
                "TeaCache has no published coefficients for Wan 2.2 TI2V-5B: use one of diffusers' caches, as in "
                "cache=FirstBlockCacheConfig()."
            )

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
        blocks = config.num_layers * self.block_flops(config, video, text_tokens)
        ends = video * geometry.patch**2 * (config.in_channels + config.out_channels) * width
        text = text_tokens * (config.text_dim * width + width**2)
        times = video if _has_time_per_token(config) else 1
        return blocks + 2.0 * (ends + text + times * (config.freq_dim + 7 * width) * width)

    def block_flops(self, config: Any, video: int, text_tokens: int) -> float:
        """Floating-point operations of one block per sample, for ``video`` and ``text_tokens`` tokens."""
        width = config.num_attention_heads * config.attention_head_dim
        # per token: self-attention 4 d², cross-attention query and output 2 d², feed-forward; per text token: 2 d²
        linear = video * (6 * width**2 + 2 * width * config.ffn_dim) + text_tokens * 2 * width**2
        return 2.0 * (linear + 2 * video * (video + text_tokens) * width)

    def boundaries(self, pipe: Any) -> tuple[float, ...]:
        # diffusers compares the timestep with this part of the training timesteps
        ratio = pipe.config.get("boundary_ratio")
        both = all(getattr(pipe, name, None) is not None for name in self.components)
        return (float(ratio),) if ratio is not None and both else ()

    def check_pipeline(self, pipe: Any) -> None:
        for name in self.components:
            module = getattr(pipe, name, None)
            size = tuple(module.config.patch_size) if module is not None else (1, 2, 2)
            if size[0] != 1 or size[1] != size[2]:
                raise UnsupportedPipelineError(
                    f"{name} has patch size {size}; coarse patches are defined for (1, p, p)."
                )


def _has_time_per_token(config: Any) -> bool:
    """Whether a transformer is told a timestep per token: TI2V-5B's is, known by the latents of its VAE alone."""
    return bool(config.in_channels == config.out_channels == 48)


def _frame_times(times: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """A timestep per token (B, N) by latent frames, (B, F, N/F)."""
    return times.unflatten(1, (geometry.frames, -1))


def _check_times(times: torch.Tensor) -> None:
    """Whether coarse tokens can carry the timesteps (B, F, N/F) of a call: whole frames are clean, or noisy alike.

    It waits for the device, once a call.

    Raises:
        NotCoarseError: with what is otherwise.
    """
    alike = (times == times.amax((1, 2), keepdim=True)) | (times == 0)
    whole = times == times[:, :, :1]
    one_level, whole_frames = torch.stack([alike.all(), whole.all()]).tolist()
    if not one_level:
        raise NotCoarseError("its tokens have several noise levels")
    if not whole_frames:
        raise NotCoarseError("clean and noisy tokens in one frame")


def _rope(module: nn.Module, geometry: Geometry, multiple: int, device: torch.device) -> Rotary:
    """Rotary cosines and sines (1, N, 1, head dim) at the centres of the coarse patches on the full grid."""
    rope = module.rope
    rows, columns = geometry.grid(multiple)
    axes = (
        (rope.t_dim, coarse_centres(geometry.frames_at(multiple), frames_of(multiple), device)),
        (rope.h_dim, coarse_centres(rows, side_of(multiple), device)),
        (rope.w_dim, coarse_centres(columns, side_of(multiple), device)),
    )
    cosines, sines = spread(
        [
            get_1d_rotary_pos_embed(dim, centres, 10000.0, use_real=True, freqs_dtype=torch.float64)
            for dim, centres in axes
        ]
    )
    return cosines[None, :, None], sines[None, :, None]
