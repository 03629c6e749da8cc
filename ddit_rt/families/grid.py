"""Transformers that take latents (B, C, F, H, W) as they are, embed them by a convolution and make positions inside.

Wan and its kin. Patches are 1 x p x p, condition channels follow the latent's, and the rotary tables come from a child
called ``rope`` that looks at nothing but the shape of the latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import nn

from ..granularity import (
    Geometry,
    OwnEnds,
    PatchEnds,
    PatchProjections,
    Scalar,
    bands,
    pad_to_grid,
    swapped,
)
from ..runtime import own_part
from .base import Family, ModelInputs, no_result, raw_sample
from .weights import layer_views, stored

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines."""

Resize = Callable[[torch.Tensor], torch.Tensor]
"""Pixels of the full grid -> those of a coarse run."""


class GridFamily(Family):
    """A family whose transformer sees the latent's grid and flattens it to tokens itself."""

    channels_first: ClassVar[bool] = False
    """Whether the values of a de-embedded token are ordered (channel, row, column), not (row, column, channel)."""

    @abstractmethod
    def patch(self, config: Any) -> int:
        """Side p of the transformer's patches."""

    @abstractmethod
    def centred_rope(self, module: nn.Module, geometry: Geometry, multiple: int, device: torch.device) -> Rotary:
        """What ``rope`` gives for coarse tokens at the centres of the full patches that each covers."""

    def coarse_arguments(self, call: ModelInputs, sigma: Scalar, multiple: int) -> dict[str, Any]:
        """The arguments beside the latent for coarse tokens; as for :meth:`low_arguments`."""
        times = {self.time_argument: self.coarse_time(call, sigma, multiple)}
        return {**call.arguments, **times, "return_dict": False}

    def coarse_time(self, call: ModelInputs, sigma: Scalar, multiple: int) -> torch.Tensor:
        """The time argument of a coarse run: σ' lies between the scheduler's (often whole) timesteps."""
        return bands.noise_level(call.arguments[self.time_argument].float(), self.time_of(sigma))

    def coarse_latent(self, call: ModelInputs, latent: torch.Tensor, resized: Resize) -> torch.Tensor:
        """What the transformer gets in a coarse run.

        Args:
            call: The full call.
            latent: (B, C or more, F, H', W'), to be coarsened or coarsened already.
            resized: Brings the call's own latent to that size.
        """
        return latent

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        hidden = arguments[self.latent_argument]
        config: Any = module.config
        latent, condition = hidden[:, : config.out_channels], hidden[:, config.out_channels :]
        frames, height, width = hidden.shape[2:]
        geometry = Geometry(config.out_channels, frames, height, width, self.patch(config))
        given = condition if condition.shape[1] else None
        return ModelInputs(arguments, latent, given, geometry, self.text_tokens(arguments))

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return raw_sample(raw)

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        return self.returned(call, prediction)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        def resized(pixels: torch.Tensor) -> torch.Tensor:
            return bands.means(pixels, call.geometry, multiple)

        hidden = self._with_condition(call, low, resized)
        return {**self.coarse_arguments(call, sigma, multiple), self.latent_argument: hidden}

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return raw[0]

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        if native:
            return nullcontext()
        tables = self.centred_rope(module, call.geometry, multiple, call.latent.device)
        rope: Any = module.rope
        return swapped(module, rope=lambda _: own_part(rope, tables))

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)
        weight, bias = stored(deembed), stored(deembed, "bias")
        if self.channels_first:
            pixels = self.patch(module.config) ** 2
            weight, bias = (rearrange(rows, "(c s) ... -> (s c) ...", s=pixels) for rows in (weight, bias))
        return PatchProjections(stored(embed)[:, :, 0], stored(embed, "bias"), weight, bias)

    def own_ends(self, module: nn.Module, call: ModelInputs) -> OwnEnds:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)
        return layer_views(
            embed, deembed, call.latent, call.geometry.patch, call.geometry.channels, self.channels_first
        )

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
        geometry = call.geometry
        rows, columns = geometry.grid(multiple)
        grid = (geometry.frames_at(multiple), rows, columns)

        def resized(own: torch.Tensor) -> torch.Tensor:
            return pad_to_grid(own, geometry, multiple)

        pixels = self._with_condition(call, latent, resized)

        def embed(_: torch.Tensor) -> torch.Tensor:
            # the transformer flattens (B, d, F, rows, columns) to tokens
            return ends.read(pixels).transpose(1, 2).unflatten(2, grid)

        written: list[torch.Tensor] = []

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            written.append(ends.write(tokens, grid))
            return no_result(tokens, geometry.patch**2)

        # Only the shape of the latent reaches the trunk: one whose p x p grid is the coarse grid. The transformer's
        # own un-patchify knows p alone, so its result is left aside.
        shape = (pixels.shape[0], 1, grid[0], rows * geometry.patch, columns * geometry.patch)
        arguments = call.fresh_arguments() if sigma is None else self.coarse_arguments(call, sigma, multiple)
        arguments |= {self.latent_argument: pixels.new_empty(shape), "return_dict": False}
        stand_ins = dict(zip(self.projection_names, (embed, deembed)))
        with swapped(module, **stand_ins), self.placed(module, call, multiple, native):
            forward(**arguments)
        return written[0]

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        modules = (getattr(pipe, name, None) for name in self.components)
        config = next(module for module in modules if module is not None).config
        patch = self.patch(config)
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        side = pipe.vae_scale_factor_spatial * patch
        return Geometry(config.out_channels, latent_frames, height // side * patch, width // side * patch, patch)

    def _with_condition(self, call: ModelInputs, latent: torch.Tensor, resized: Resize) -> torch.Tensor:
        hidden = self.coarse_latent(call, latent.to(call.latent.dtype), resized)
        return hidden if call.condition is None else torch.cat([hidden, resized(call.condition)], dim=1)


def spread(tables: Sequence[Rotary]) -> Rotary:
    """Rotary tables of single axes as those of a grid's tokens.

    Args:
        tables: Per axis, cosines and sines (n, d).

    Returns:
        (N, D): N the product of all n, the last axis fastest; D the sum of all d.
    """
    sizes = [len(cosines) for cosines, _ in tables]

    def joined(part: int) -> torch.Tensor:
        views = []
        for axis, table in enumerate(tables):
            shape = [n if place == axis else 1 for place, n in enumerate(sizes)]
            views.append(table[part].view(*shape, -1).expand(*sizes, -1))
        return torch.cat(views, dim=-1).flatten(0, -2)

    return joined(0), joined(1)
