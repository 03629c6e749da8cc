"""LTX-2: video and its sound from one run. Packed tokens of one latent pixel, positions an argument, timestep = 1000 σ.

Video is coarsened; the sound keeps its tokens, its noise level and its own prediction of every run. Frames that are
given (image-to-video) have tokens of timestep 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import (
    Geometry,
    PatchEnds,
    PatchProjections,
    Scalar,
    bands,
    pad_to_grid,
    swapped,
)
from .base import Family, ModelInputs, NotCoarseError, no_result, raw_sample
from .weights import stored

if "sigma" not in inspect.signature(LTX2VideoTransformer3DModel.forward).parameters:
    raise ImportError("this diffusers does not tell LTX-2's transformer the noise level", name="diffusers")

_TIME_CHANNELS = 256  # of the sinusoids that an embedding of the timestep begins with
_SOUND_RATE = 25  # latents a second
_FRAME_RATE = 24  # of the model's own videos


class LTX2(Family):
    name = "ltx2"
    transformer_class = LTX2VideoTransformer3DModel
    pipelines = (LTX2Pipeline, LTX2ImageToVideoPipeline)
    projection_names = ("proj_in", "proj_out")
    time_scale = 1000.0
    time_argument = "sigma"  # timestep is 0 for tokens of a given frame
    companion_scheduler = "audio_scheduler"
    multiples = (1, 2)  # one token is 32 x 32 pixels: 4p leaves 24 tokens of a frame of 512 x 768
    limits: ClassVar[dict[str, str]] = {
        "first-block cache": "diffusers' caches do not know LTX-2's blocks",
        "fit": "what is measured for a fit is one output's, and the transformer makes two",
    }
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        "attention": r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
        "audio": r"transformer_blocks\.\d+\.audio_(ff\.net\.(0\.proj|2)|attn[12]\.(to_[qkv]|to_out\.0))",
        "audio-video": r"transformer_blocks\.\d+\.(audio_to_video|video_to_audio)_attn\.(to_[qkv]|to_out\.0)",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        for name in ("video_self_attention_mask", "video_keyframes_mask"):
            if arguments.get(name) is not None:
                raise NotCoarseError(f"{name} has a value per full token")
        if arguments.get("video_coords") is None:
            raise NotCoarseError("the call has no video_coords to place coarse tokens by")
        tokens = arguments["hidden_states"]
        frames, rows, columns = (int(arguments[name]) for name in ("num_frames", "height", "width"))
        if tokens.shape[1] != frames * rows * columns:
            raise NotCoarseError(f"{tokens.shape[1]} tokens are no plain grid of {frames} x {rows} x {columns}")
        latent = _unpacked(tokens, frames, rows, columns)
        geometry = Geometry(module.config.out_channels, frames, rows, columns, 1)
        return ModelInputs(arguments, latent, None, geometry, self.text_tokens(arguments))

    def packing(self, geometry: Geometry) -> tuple[int, ...] | None:
        return geometry.frames, geometry.height, geometry.width

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        return bool(max(call["guidance_scale"], call["audio_guidance_scale"] or 0) > 1)

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        geometry = call.geometry
        return _unpacked(raw_sample(raw), geometry.frames, geometry.height, geometry.width)

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        sample = _packed(prediction)
        if call.arguments.get("return_dict", True):
            return AudioVisualModelOutput(sample=sample, audio_sample=None)
        return (sample, None)

    def companion(self, raw: Any) -> torch.Tensor | None:
        return raw[1] if isinstance(raw, tuple) else raw.audio_sample

    def accompanied(self, raw: Any, companion: torch.Tensor) -> Any:
        if isinstance(raw, tuple):
            return (raw[0], companion)
        return AudioVisualModelOutput(sample=raw.sample, audio_sample=companion)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        pixels = low.to(call.latent.dtype)
        given = _given_frames(call)
        if given is not None:
            # they are no noise, which a coarse state scales down
            own = bands.means(call.latent, call.geometry, multiple)
            pixels = torch.where(given, own, pixels)
        return self._coarse_arguments(call, _packed(pixels), sigma, multiple, native)

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return _unpacked(raw[0], call.geometry.frames, *call.geometry.grid(multiple))

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
        prediction = super().run_low(module, forward, call, latent, sigma, multiple, native)
        return _before_the_split(call, prediction, latent, sigma, multiple)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = module.proj_in, module.proj_out
        weight = stored(embed)[:, :, None, None]
        return PatchProjections(weight, stored(embed, "bias"), stored(deembed), stored(deembed, "bias"))

    def run_patches(
        self,
        module: nn.Module,
        forward: Any,
        call: ModelInputs,
        latent: torch.Tensor,
        sigma: Scalar | None,
        ends: PatchEnds,
        multiple: int,
        native: bool,
    ) -> torch.Tensor:
        assert sigma is not None  # its own ends are never exchanged at full size, see Family.own_ends
        geometry, pixels = call.geometry, latent.to(call.latent.dtype)
        channels, given = geometry.channels, _given_frames(call)
        if given is not None:  # as in low_arguments; further channels are an adapter's
            own = pad_to_grid(call.latent, geometry, multiple)
            pixels = torch.cat([torch.where(given, own, pixels[:, :channels]), pixels[:, channels:]], dim=1)
        grid = (geometry.frames, *geometry.grid(multiple))
        written: list[torch.Tensor] = []

        def embed(_: torch.Tensor) -> torch.Tensor:
            return ends.read(pixels)

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            written.append(ends.write(tokens, grid))
            return no_result(tokens, 1)

        # what the embedding takes is never looked at
        tokens = pixels.new_empty(len(pixels), geometry.tokens(multiple), 1)
        arguments = self._coarse_arguments(call, tokens, sigma, multiple, native)
        with swapped(module, proj_in=embed, proj_out=deembed):
            forward(**arguments)
        found = written[0]
        if given is None or found.shape[1] == channels:
            return found
        # of an adapter's two predictions the first goes through the band split
        split = _before_the_split(call, found[:, :channels], latent[:, :channels], sigma, multiple)
        return torch.cat([split, found[:, channels:]], dim=1)

    def _coarse_arguments(
        self, call: ModelInputs, tokens: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        full, geometry = call.arguments, call.geometry
        rows, columns = geometry.grid(multiple)
        arguments = call.fresh_arguments()
        noisy = bands.noise_level(full["sigma"].float(), self.time_of(sigma))
        for name in ("timestep", "sigma"):
            # the sound stays at its own noise level
            own = full.get(f"audio_{name}")
            arguments[f"audio_{name}"] = full["sigma"] if own is None else own
            arguments[name] = noisy
        if full["timestep"].ndim > 1:
            times = _corner(full["timestep"], geometry, rows, columns)
            arguments["timestep"] = torch.where(times > 0, noisy[:, None], 0.0)
        coords = _corner(full["video_coords"], geometry, rows, columns, dim=2)
        if not native:
            # bounds in pixels, which begin at 0: patches k times as large
            scale = torch.tensor([1.0, multiple, multiple], dtype=coords.dtype, device=coords.device)
            coords = coords * scale[:, None, None]
        arguments.update(hidden_states=tokens, video_coords=coords, height=rows, width=columns, return_dict=False)
        return arguments

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        # the sound's length is that of a video of 24 frames a second; of runs that leave out attention, as guidance
        # across time or modalities makes, the whole is counted
        config = module.config
        video = geometry.tokens(multiple)
        seconds = (config.vae_scale_factors[0] * (geometry.frames - 1) + 1) / _FRAME_RATE
        sound = round(seconds * _SOUND_RATE)
        width = config.num_attention_heads * config.attention_head_dim
        narrow = config.audio_num_attention_heads * config.audio_attention_head_dim

        def stream(tokens: int, width: int, context: int) -> float:
            """Self-attention, attention to the text, feed-forward."""
            own = tokens * 4 * width**2 + 2 * tokens**2 * width
            text = tokens * 2 * width**2 + text_tokens * 2 * context * width + 2 * tokens * text_tokens * width
            return own + text + tokens * 8 * width**2

        blocks = stream(video, width, config.cross_attention_dim)
        blocks += stream(sound, narrow, config.audio_cross_attention_dim)
        # between the two, at the sound's width: queries and output of one, keys and values of the other
        blocks += 4 * (video * width + sound * narrow) * narrow + 4 * video * sound * narrow
        heads = config.num_attention_heads, config.audio_num_attention_heads
        if config.gated_attn:
            blocks += video * width * (2 * heads[0] + heads[1])
        if config.audio_gated_attn:
            blocks += sound * narrow * 3 * heads[1]
        ends = video * (config.in_channels + config.out_channels) * width
        ends += sound * (config.audio_in_channels + config.audio_out_channels) * narrow
        texts = 0
        if config.use_prompt_embeddings:
            texts = text_tokens * sum(config.caption_channels * w + w**2 for w in (width, narrow))
        prompted = (config.cross_attn_mod or config.audio_cross_attn_mod) and config.use_prompt_adaln_single
        times = 0
        for w, modulated in ((width, config.cross_attn_mod), (narrow, config.audio_cross_attn_mod)):
            parts = [9 if modulated else 6, 4, 1, *([2] if prompted else [])]
            times += sum(_TIME_CHANNELS * w + w**2 + part * w**2 for part in parts)
        return 2.0 * (config.num_layers * blocks + ends + texts + times)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        side = pipe.vae_spatial_compression_ratio
        latent_frames = (frames - 1) // pipe.vae_temporal_compression_ratio + 1
        return Geometry(pipe.transformer.config.out_channels, latent_frames, height // side, width // side, 1)

    def check_pipeline(self, pipe: Any) -> None:
        config = pipe.transformer.config
        if (config.patch_size, config.patch_size_t) != (1, 1):
            raise UnsupportedPipelineError(
                f"the transformer has patches of {config.patch_size_t} x {config.patch_size} x {config.patch_size} "
                "latent pixels; coarse patches of LTX-2 are defined for 1 x 1 x 1, as all published models have them."
            )


def _given_frames(call: ModelInputs) -> torch.Tensor | None:
    """Which frames are given, (B, 1, F, 1, 1); None in a call without such frames."""
    times, geometry = call.arguments["timestep"], call.geometry
    if times.ndim == 1:
        return None
    return (times.reshape(len(times), 1, geometry.frames, -1)[..., :1] == 0)[..., None]


def _before_the_split(
    call: ModelInputs, prediction: torch.Tensor, latent: torch.Tensor, sigma: Scalar, multiple: int
) -> torch.Tensor:
    """What the band split of a coarse state ``latent`` makes the model's prediction of, at frames that are given.

    The split takes a frame for a mixture of noise and picture. A given frame is none, and the pipeline does not step
    it; but guidance is rescaled by a deviation over all frames.
    """
    given = _given_frames(call)
    if given is None:
        return prediction
    if isinstance(sigma, torch.Tensor) and sigma.ndim:  # one per sample
        sigma = sigma.to(prediction.dtype).view(-1, 1, 1, 1, 1)
    share = (1 - sigma) / multiple + sigma
    return torch.where(given, (prediction + latent * (1 - 1 / multiple)) / share, prediction)


def _corner(values: torch.Tensor, geometry: Geometry, rows: int, columns: int, dim: int = 1) -> torch.Tensor:
    """Values per token of the first rows and columns of every frame; tokens lie along ``dim``."""
    grid = values.unflatten(dim, (geometry.frames, geometry.height, geometry.width))
    return grid.narrow(dim + 1, 0, rows).narrow(dim + 2, 0, columns).flatten(dim, dim + 2)


def _unpacked(tokens: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
    """(B, F·rows·columns, C) -> (B, C, F, rows, columns)."""
    return tokens.unflatten(1, (frames, rows, columns)).movedim(-1, 1)


def _packed(latent: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_unpacked`."""
    return latent.movedim(1, -1).flatten(1, 3)
