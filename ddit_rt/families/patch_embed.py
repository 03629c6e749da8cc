"""Transformers that embed patches of latents (B, C, H, W) by diffusers' ``PatchEmbed``, a convolution with positions.

Condition channels follow the latent's. The de-embedding may give more channels than the latent has, first the
prediction and then the variance of the noise that a sampler adds. Coarse steps predict the first alone and fill up with
zeros: only samplers that add noise would read the rest, pipelines cut it off before the scheduler's step, and no
scheduler that adds noise is accelerated.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import UnsupportedPipelineError
from ..granularity import (
    Geometry,
    OwnEnds,
    PatchEnds,
    PatchProjections,
    Scalar,
    bands,
    coarse_centres,
    pad_to_grid,
    swapped,
)
from .base import Family, ModelInputs, no_result, raw_sample
from .weights import layer_views, stored

TIME_CHANNELS = 256
"""Sinusoids that the embedding of a timestep begins with."""

NO_FIT = "schedules are fitted to flows, and these models predict noise or v"
"""A declared limit of families here."""


class PatchEmbedFamily(Family):
    """A family whose positions are made inside, from the latent's size."""

    time_scale = 1000.0

    @abstractmethod
    def channels(self, module: nn.Module) -> int:
        """Channels of the latent."""

    @abstractmethod
    def centres(self, module: nn.Module, call: ModelInputs, multiple: int) -> torch.Tensor:
        """Position embeddings (1, N, d) at the centres of coarse patches on the full grid."""

    def conditions(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        """Arguments that depend on the grid, or on the picture's size, for coarse tokens; as for `low_arguments`."""
        return {}

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        hidden, channels = arguments["hidden_states"].unsqueeze(2), self.channels(module)
        condition = hidden[:, channels:] if hidden.shape[1] > channels else None
        geometry = Geometry(channels, 1, hidden.shape[3], hidden.shape[4], module.config.patch_size)
        return ModelInputs(arguments, hidden[:, :channels], condition, geometry, self.text_tokens(arguments))

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return raw_sample(raw)[:, : call.geometry.channels].unsqueeze(2)

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        sample = prediction[:, :, 0]
        missing = out_channels(module) - sample.shape[1]
        if missing:
            sample = torch.cat([sample, sample.new_zeros(sample.shape[0], missing, *sample.shape[2:])], dim=1)
        return self.returned(call, sample)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        hidden = low.to(call.latent.dtype)
        if call.condition is not None:
            hidden = torch.cat([hidden, bands.means(call.condition, call.geometry, multiple)], dim=1)
        return {**self._coarse_arguments(call, sigma, multiple, native), "hidden_states": hidden[:, :, 0]}

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return self.output(module, call, raw)

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        if native:
            return nullcontext()
        embedding: Any = module.pos_embed
        centres = self.centres(module, call, multiple)

        def embed(latent: torch.Tensor) -> torch.Tensor:
            tokens = embedding.proj(latent).flatten(2).mT
            return (tokens + centres).to(tokens.dtype)

        return swapped(module, pos_embed=embed)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)
        area, channels = module.config.patch_size**2, self.channels(module)

        def prediction(rows: torch.Tensor) -> torch.Tensor:
            # rows are ordered (row, column, channel)
            return rows.unflatten(0, (area, -1))[:, :channels].flatten(0, 1)

        return PatchProjections(
            stored(embed), stored(embed, "bias"), prediction(stored(deembed)), prediction(stored(deembed, "bias"))
        )

    def own_ends(self, module: nn.Module, call: ModelInputs) -> OwnEnds:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)
        return layer_views(embed, deembed, call.latent, call.geometry.patch, call.geometry.channels, False)

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
        geometry, out, patch = call.geometry, out_channels(module), call.geometry.patch
        rows, columns = geometry.grid(multiple)
        pixels = latent.to(call.latent.dtype)
        if call.condition is not None:
            pixels = torch.cat([pixels, pad_to_grid(call.condition, geometry, multiple)], dim=1)

        def embed(_: torch.Tensor) -> torch.Tensor:
            return ends.read(pixels).mT.unflatten(2, (rows, columns))

        written: list[torch.Tensor] = []

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            written.append(ends.write(tokens, (1, rows, columns)))
            return no_result(tokens, patch**2 * out)

        # Only the shape of hidden_states reaches the trunk: a latent whose p x p grid is the coarse grid. The
        # transformer's own un-patchify knows p alone, so its result is left aside.
        arguments = call.fresh_arguments()
        if sigma is not None:
            arguments = self._coarse_arguments(call, sigma, multiple, native)
        hidden = pixels.new_empty(pixels.shape[0], 1, rows * patch, columns * patch)
        arguments |= {"hidden_states": hidden, "return_dict": False}
        stand_ins = dict(zip(self.projection_names, (embed, deembed)))
        with self.placed(module, call, multiple, native), swapped(module, **stand_ins):
            forward(**arguments)
        return written[0]

    def _coarse_arguments(self, call: ModelInputs, sigma: Scalar, multiple: int, native: bool) -> dict[str, Any]:
        arguments = {**call.fresh_arguments(), **self.conditions(call, multiple, native), "return_dict": False}
        # the time of a coarse step lies between the scheduler's, or those of training, which may be whole numbers
        arguments["timestep"] = bands.noise_level(arguments["timestep"].float(), self.time_of(sigma))
        return arguments


class NoisePredictingFamily(PatchEmbedFamily):
    """DiT and PixArt: sines and cosines made for any grid, and noise or v predicted.

    Positions are spread over the range that the model was trained on: token i of n lies at i·m/n, where m is the tokens
    a side of training, whatever n is. So a smaller latent gets by itself what a picture of that size gets, and a coarse
    token lies where the first of the full ones it covers does.
    """

    variance_preserving = True
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        "attention": r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
    }

    @abstractmethod
    def conditioning_flops(self, module: nn.Module, tokens: int, text_tokens: int) -> float:
        """Multiply-adds of one forward per sample that belong neither to self-attention and feed-forward of the blocks
        nor to embedding and de-embedding of ``tokens`` patches."""

    def channels(self, module: nn.Module) -> int:
        return int(module.config.in_channels)

    def centres(self, module: nn.Module, call: ModelInputs, multiple: int) -> torch.Tensor:
        return centred_positions(module.pos_embed, call.geometry, multiple, call.latent.device)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        tokens, first = geometry.tokens(multiple), module.transformer_blocks[0]  # type: ignore[index]
        up, down = first.ff.net[0].proj, first.ff.net[2]  # type: ignore[union-attr]
        feed_forward = up.in_features * up.out_features + down.in_features * down.out_features
        blocks = config.num_layers * tokens * (4 * width**2 + feed_forward + 2 * tokens * width)
        ends = tokens * geometry.patch**2 * (config.in_channels + out_channels(module)) * width
        return 2.0 * (blocks + ends + self.conditioning_flops(module, tokens, text_tokens))

    def check_pipeline(self, pipe: Any) -> None:
        channels, out = pipe.transformer.config.in_channels, out_channels(pipe.transformer)
        if out not in (channels, 2 * channels):
            raise UnsupportedPipelineError(
                f"the transformer gives {out} channels for {channels}: known are the prediction alone, "
                "and prediction and variance."
            )


def out_channels(module: nn.Module) -> int:
    """Channels that the transformer gives, those of a variance included."""
    return int(module.out_channels)  # type: ignore[arg-type]


def centred_positions(
    embedding: Any, geometry: Geometry, multiple: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Position embeddings at the centres of coarse patches on the full grid.

    Args:
        embedding: The transformer's ``PatchEmbed``.
        geometry: Of the latent.
        multiple: k.
        device: Of the result.

    Returns:
        float32 (1, N, d): for each token sines and cosines of its column, then of its row.
    """
    rows, columns = geometry.grid(1)
    coarse_rows, coarse_columns = geometry.grid(multiple)
    range_of_training = embedding.base_size / embedding.interpolation_scale
    row = _sincos(coarse_centres(coarse_rows, multiple, device) * (range_of_training / rows), embedding.proj)
    column = _sincos(coarse_centres(coarse_columns, multiple, device) * (range_of_training / columns), embedding.proj)
    grid = (coarse_rows, coarse_columns, -1)
    return torch.cat([column.expand(grid), row[:, None].expand(grid)], dim=-1).flatten(0, 1)[None]


def _sincos(places: torch.Tensor, projection: Any) -> torch.Tensor:
    """Sines, then cosines, of ``places`` (N,) at d/4 frequencies, 10000^0 down to 10000^-1; float32 (N, d/2)."""
    count = projection.out_channels // 4
    exponents = torch.arange(count, device=places.device, dtype=torch.float32) / count
    angles = places[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
