"""Z-Image (base, Turbo): lists of latents (C, F, H, W), patches of 2 x 2, sequences padded to multiples of 32.

The transformer is told 1 - σ and predicts the way from noise to picture, which the pipelines negate. It makes positions
inside: a caption's tokens count up the first axis, the picture's stand behind them on it and count rows and columns on
the others, padding stands at the origin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import (
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from einops import rearrange
from packaging import version
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import (
    Geometry,
    PatchEnds,
    PatchProjections,
    Scalar,
    bands,
    swapped,
)
from .base import Family, ModelInputs, NotCoarseError, no_result, raw_sample
from .weights import stored

PATCH = 2
SEQUENCE = 32
"""Sequences are padded to multiples of it, a picture's and a caption's each."""
_WAITS = version.parse(diffusers.__version__).release < (0, 40)
_ENDS = f"{PATCH}-1"  # patches over one frame; the transformer can hold ends for several sizes


class ZImage(Family):
    name = "z-image"
    transformer_class = ZImageTransformer2DModel
    pipelines = (ZImagePipeline, ZImageImg2ImgPipeline, ZImageInpaintPipeline)
    projection_names = (f"all_x_embedder.{_ENDS}", f"all_final_layer.{_ENDS}.linear")
    latent_argument = "x"
    listed_arguments = frozenset({"x", "cap_feats"})
    time_argument = "t"
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"(layers|noise_refiner)\.\d+\.feed_forward\.w[123]",
        "attention": r"(layers|noise_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)",
    }
    graph_obstacle = "diffusers before 0.40 waits for the device to put padding into its place" if _WAITS else ""
    limits: ClassVar[dict[str, str]] = {
        "first-block cache": "diffusers has no caches for ZImageTransformer2DModel",
        **({"graphs": graph_obstacle} if graph_obstacle else {}),
    }

    def time_of(self, sigma: Scalar) -> Scalar:
        return 1 - sigma

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        # the longest caption's: the others are padded to it
        return max(_padded(len(caption)) for caption in arguments["cap_feats"])

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        # both prompts are one call of twice the batch, until 1 - σ exceeds the truncation
        truncation = call["cfg_truncation"]
        return bool(call["guidance_scale"] > 0 and (truncation is None or truncation >= 1))

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        if arguments.get("controlnet_block_samples") is not None:
            raise NotCoarseError("controlnet_block_samples has one residual per full token")
        latents = arguments["x"]
        if isinstance(latents[0], list):
            raise NotCoarseError("lists of pictures per sample (Omni) are not supported on coarse tokens")
        shapes = {tuple(latent.shape) for latent in latents}
        if len(shapes) > 1:
            raise NotCoarseError(f"latents of several sizes in one call: {sorted(shapes)}")
        patches = (arguments.get("patch_size", PATCH), arguments.get("f_patch_size", 1))
        if patches != (PATCH, 1):
            raise NotCoarseError(f"patches of (side, frames) {patches}: coarse ones are defined for ({PATCH}, 1)")
        latent = torch.stack(latents)
        channels, frames, height, width = latent.shape[1:]
        geometry = Geometry(channels, frames, height, width, PATCH)
        return ModelInputs(arguments, latent, None, geometry, self.text_tokens(arguments))

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return -torch.stack(list(raw_sample(raw)))

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        return self.returned(call, list((-prediction).unbind(0)))

    def canonical(self, module: nn.Module, call: ModelInputs, output: torch.Tensor) -> torch.Tensor:
        # negated already, and without the frame
        return output.unsqueeze(2)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        return _coarse_arguments(call, low.to(call.latent.dtype), self.time_of(sigma))

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return self.output(module, call, raw)

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        return nullcontext() if native else _centred(module, multiple)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)
        weight = stored(embed)
        shape = torch.Size((len(weight), weight.shape[1] // PATCH**2, PATCH, PATCH))
        embed_weight = self.embed_layout(weight, shape)
        return PatchProjections(embed_weight, stored(embed, "bias"), stored(deembed), stored(deembed, "bias"))

    def embed_layout(self, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        # tokens hold (row, column, channel) at both ends
        return rearrange(weight, "d (p q c) -> d c p q", p=PATCH, q=PATCH)

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
        geometry = call.geometry
        rows, columns = geometry.grid(multiple)
        count = geometry.tokens(multiple)
        pixels = latent.to(call.latent.dtype)

        def embed(_: torch.Tensor) -> torch.Tensor:
            tokens = ends.read(pixels)
            # all samples in one sequence, each padded; the transformer puts its own token in the padding's place
            return F.pad(tokens, (0, 0, 0, _padded(count) - count)).flatten(0, 1)

        written: list[torch.Tensor] = []

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            written.append(ends.write(tokens[:, :count], (geometry.frames, rows, columns)))
            # the transformer's own un-patchify knows p alone: its result is left aside
            return no_result(tokens, PATCH**2 * geometry.channels)

        # of the latents only the size reaches the trunk: those whose p x p grid is the coarse grid
        shape = (len(pixels), geometry.channels, geometry.frames, rows * PATCH, columns * PATCH)
        arguments = _coarse_arguments(call, pixels.new_empty(shape), self.time_of(sigma))
        stand_ins = dict(zip(self.projection_names, (embed, deembed)))
        with swapped(module, **stand_ins), self.placed(module, call, multiple, native):
            forward(**arguments)
        return -written[0]

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width, modulated = config.dim, min(config.dim, 256)
        image, text = _padded(geometry.tokens(multiple)), _padded(text_tokens)
        # per token: attention 4 d², gated feed-forward 3 · 8/3 d²
        per_token = 4 * width**2 + 3 * width * int(width / 3 * 8)
        lengths = [image + text] * config.n_layers + [image, text] * config.n_refiner_layers
        blocks = sum(per_token * tokens + 2 * tokens**2 * width for tokens in lengths)
        modulation = (config.n_layers + config.n_refiner_layers) * 4 * modulated * width + modulated * width
        times = (256 + modulated) * 1024
        # the final layer runs over the captions' tokens too
        ends = (2 * image + text) * PATCH**2 * config.in_channels * width + text * config.cap_feat_dim * width
        return 2.0 * (blocks + modulation + times + ends)

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        side = pipe.vae_scale_factor * PATCH
        channels = pipe.transformer.config.in_channels
        return Geometry(channels, 1, height // side * PATCH, width // side * PATCH, PATCH)

    def check_pipeline(self, pipe: Any) -> None:
        sizes = list(zip(pipe.transformer.config.all_patch_size, pipe.transformer.config.all_f_patch_size))
        if (PATCH, 1) not in sizes:
            raise UnsupportedPipelineError(
                f"transformer has patches of (side, frames) {sizes}; coarse patches are defined for ({PATCH}, 1)."
            )


def _padded(tokens: int) -> int:
    return -(-tokens // SEQUENCE) * SEQUENCE


def _coarse_arguments(call: ModelInputs, latent: torch.Tensor, time: Scalar) -> dict[str, Any]:
    level = bands.noise_level(call.arguments["t"], time)
    return {**call.arguments, "x": list(latent.unbind(0)), "t": level, "return_dict": False}


@contextmanager
def _centred(module: nn.Module, multiple: int) -> Iterator[None]:
    """Within the context, a run's latents stand at the centres of the full patches that each coarse one covers.

    The transformer looks whole positions up in tables: of latents first, then of captions.
    """
    own = module.rope_embedder
    looked_up = False

    def rope(ids: torch.Tensor) -> torch.Tensor:
        nonlocal looked_up
        if looked_up:
            return own(ids)
        looked_up = True
        precision = torch.float32 if ids.device.type == "mps" else torch.float64
        # padding, at the origin, stays there
        centres = torch.where(ids[:, :1] > 0, ids[:, 1:] * multiple + (multiple - 1) / 2, 0).to(precision)
        parts = [own(ids)[:, : own.axes_dims[0] // 2]]
        for axis, size in enumerate(own.axes_dims[1:]):
            exponents = torch.arange(0, size, 2, dtype=precision, device=ids.device) / size
            angles = (centres[:, axis, None] / own.theta**exponents).float()
            parts.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(parts, dim=-1)

    module.rope_embedder = rope
    try:
        yield
    finally:
        module.rope_embedder = own
