"""Transformers whose tokens are 2 x 2 latent pixels that the pipeline packs: FLUX and its kin.

Embedding and de-embedding are linear layers; a token's values are ordered (channel, row, column). Condition channels
follow the latent's in every token, and tokens of reference pictures follow the latent's in the sequence: these are
embedded as they are, while the latent's grid is coarsened, unless they have to lie where the latent's do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
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
from .base import Family, ModelInputs, NotCoarseError, no_result, raw_sample
from .weights import layer_views, stored

PATCH = 2


class PackedFamily(Family):
    """A family whose scheduler steps packed tokens (B, N, C·2·2)."""

    references_share_grid: ClassVar[bool] = False
    """Whether a reference has as many tokens as the latent, each at its counterpart's place: where coarse tokens take a
    small picture's places, the reference becomes that small, as it is beside a small picture."""

    @abstractmethod
    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of the latent's tokens in a call; they come first in the sequence.

        Raises:
            NotCoarseError: they lie on no grid.
        """

    def frames(self, module: nn.Module, arguments: Mapping[str, Any]) -> int:
        """How many such grids the latent has, one after the other in the sequence."""
        return 1

    @abstractmethod
    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        """The arguments that hold something per token, positions first of all; as for :meth:`low_arguments`."""

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        tokens = arguments[self.latent_argument]
        rows, columns = self.grid(arguments)
        frames = self.frames(module, arguments)
        geometry = Geometry(self._channels(module), frames, rows * PATCH, columns * PATCH, PATCH)
        count, channels = geometry.tokens(1), geometry.channels
        pixels = _unpacked(tokens[:, :count], frames, rows, columns)
        condition = pixels[:, channels:] if pixels.shape[1] > channels else None
        references = tokens[:, count:] if tokens.shape[1] > count else None
        beside = 0 if references is None else references.shape[1]
        if self.references_share_grid and beside not in (0, count):
            raise NotCoarseError(f"a reference of {beside} tokens does not lie on the picture's grid of {count}")
        text_tokens = self.text_tokens(arguments) + beside
        return ModelInputs(arguments, pixels[:, :channels], condition, geometry, text_tokens, references)

    def tokens_beside(self, call: ModelInputs, multiple: int, native: bool) -> int:
        if not self._shrinks(call, native):
            return call.text_tokens
        return call.text_tokens - call.geometry.tokens(1) + call.geometry.tokens(multiple)

    def packing(self, geometry: Geometry) -> tuple[int, int] | None:
        # frames one below the other: where a coarse patch does not divide their rows, some lie across two
        rows, columns = geometry.grid(1)
        return geometry.frames * rows, columns

    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        return _prediction(call.geometry, raw_sample(raw), 1)

    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        sample = _packed(prediction)
        if call.references is not None:
            # pipelines cut off what the model makes of references
            rest = call.references.shape[1]
            sample = torch.cat([sample, sample.new_zeros(sample.shape[0], rest, sample.shape[2])], dim=1)
        return self.returned(call, sample)

    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        pixels = low.to(call.latent.dtype)
        if call.condition is not None:
            condition = bands.means(call.condition, call.geometry, multiple)
            pixels = torch.cat([pixels, condition], dim=1)
        tokens = _packed(pixels)
        references = self._coarse_references(call, multiple, native)
        if references is not None:
            tokens = torch.cat([tokens, references], dim=1)
        return self._coarse_arguments(call, tokens, sigma, multiple, native)

    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        return _prediction(call.geometry, raw[0], multiple)

    def projections(self, module: nn.Module) -> PatchProjections:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)

        def pixel_major(rows: torch.Tensor) -> torch.Tensor:
            # such models order the values of a token (channel, row, column)
            return rearrange(rows, "(c s) ... -> (s c) ...", s=PATCH**2)

        bias = stored(deembed, "bias")
        return PatchProjections(
            stored(embed).unflatten(1, (-1, PATCH, PATCH)),
            stored(embed, "bias"),
            pixel_major(stored(deembed)),
            None if bias is None else pixel_major(bias),
        )

    def own_ends(self, module: nn.Module, call: ModelInputs) -> OwnEnds:
        embed, deembed = (module.get_submodule(name) for name in self.projection_names)
        return layer_views(embed, deembed, call.latent, PATCH, call.geometry.channels, channels_first=True)

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
        count, grid = call.geometry.tokens(multiple), (call.geometry.frames, *call.geometry.grid(multiple))
        references = self._coarse_references(call, multiple, native) if sigma is not None else call.references
        pixels = latent.to(call.latent.dtype)
        if call.condition is not None:
            pixels = torch.cat([pixels, pad_to_grid(call.condition, call.geometry, multiple)], dim=1)
        embed_name, deembed_name = self.projection_names
        own_embed = module.get_submodule(embed_name).forward
        written: list[torch.Tensor] = []

        def embed(_: torch.Tensor) -> torch.Tensor:
            tokens = ends.read(pixels)
            return tokens if references is None else torch.cat([tokens, own_embed(references)], dim=1)

        def deembed(tokens: torch.Tensor) -> torch.Tensor:
            written.append(ends.write(tokens[:, :count], grid))
            return no_result(tokens, 1)

        # what the embedding takes is never looked at: only how many tokens there are reaches the trunk
        beside = 0 if references is None else references.shape[1]
        tokens = pixels.new_empty(pixels.shape[0], count + beside, 1)
        arguments = self._coarse_arguments(call, tokens, sigma, multiple, native)
        with swapped(module, **{embed_name: embed, deembed_name: deembed}), self.placed(module, call, multiple, native):
            forward(**arguments)
        return written[0]

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        # compressed by the VAE, then made even for packing
        side = pipe.vae_scale_factor * PATCH
        return Geometry(self._channels(pipe.transformer), 1, height // side * PATCH, width // side * PATCH, PATCH)

    def _channels(self, module: nn.Module) -> int:
        """Channels of the latent; the embedding may take more, and a control LoRA may widen it."""
        deembed: Any = module.get_submodule(self.projection_names[1])
        return int(deembed.out_features) // PATCH**2

    def _shrinks(self, call: ModelInputs, native: bool) -> bool:
        """Whether references become as small as the latent in a coarse run."""
        return self.references_share_grid and native and call.references is not None

    def _coarse_references(self, call: ModelInputs, multiple: int, native: bool) -> torch.Tensor | None:
        """Tokens of references beside coarse ones."""
        if call.references is None or not self._shrinks(call, native):
            return call.references
        geometry = call.geometry
        pixels = _unpacked(call.references, geometry.frames, *geometry.grid(1))
        return _packed(bands.means(pixels, geometry, multiple))

    def _coarse_arguments(
        self, call: ModelInputs, tokens: torch.Tensor, sigma: Scalar | None, multiple: int, native: bool
    ) -> dict[str, Any]:
        arguments = call.fresh_arguments()
        arguments[self.latent_argument] = tokens
        arguments["return_dict"] = False
        if sigma is None:
            return arguments
        arguments[self.time_argument] = bands.noise_level(arguments[self.time_argument], self.time_of(sigma))
        return {**arguments, **self.placed_arguments(call, multiple, native)}


class PositionIdFamily(PackedFamily):
    """Positions are an argument: one row of ids per token, (N, A) or (B, N, A).

    The first axis tells the latent's tokens from those of references, the next two hold row and column.
    """

    ids_argument: ClassVar[str] = "img_ids"

    def leading_ids(self, arguments: Mapping[str, Any]) -> int:
        """Rows of ids before the latent's, which belong to other tokens."""
        return 0

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        ids = arguments[self.ids_argument]
        known = getattr(ids, "_ddit_grid", None)
        if known is None:
            # once per ids tensor, since it waits for the device
            own = (ids[0] if ids.ndim == 3 else ids)[self.leading_ids(arguments) :].detach().float().cpu()
            known = _grid_of(own, arguments[self.latent_argument].shape[1], ids.dtype)
            count = known[0] * known[1]
            if self.references_share_grid and not torch.equal(own[count:, 1:3], own[: len(own) - count, 1:3]):
                raise NotCoarseError("a reference has other positions than the picture")
            ids._ddit_grid = known
        return known

    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        places = self.places(call, multiple, native) if call.places is None else call.places
        return {self.ids_argument: places}

    def places(self, call: ModelInputs, multiple: int, native: bool) -> torch.Tensor:
        ids, shrinks = call.arguments[self.ids_argument], self._shrinks(call, native)
        # kept with the ids, of which a pipeline makes one tensor for all steps
        known: dict[Any, torch.Tensor] = ids.__dict__.setdefault("_ddit_places", {})
        key = (multiple, native, shrinks, call.geometry, ids._version if not ids.is_inference() else 0)
        if key not in known:
            known[key] = self._coarse_ids(call, multiple, native)
        return known[key]

    def _coarse_ids(self, call: ModelInputs, multiple: int, native: bool) -> torch.Tensor:
        ids, begin, count = call.arguments[self.ids_argument], self.leading_ids(call.arguments), call.geometry.tokens(1)
        pictures = [ids[..., begin:, :]]
        if self._shrinks(call, native):
            pictures = [ids[..., begin : begin + count, :], ids[..., begin + count :, :]]
        coarse = [coarse_ids(picture, call.geometry, multiple, native) for picture in pictures]
        return torch.cat([ids[..., :begin, :].to(coarse[0].dtype), *coarse], dim=-2)


def is_truly_guided(call: Mapping[str, Any]) -> bool:
    """Whether a call of a pipeline with ``true_cfg_scale`` runs the model for a negative prompt too."""
    negative = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    return bool(negative and call["true_cfg_scale"] > 1)


def coarse_ids(full: torch.Tensor, geometry: Geometry, multiple: int, native: bool) -> torch.Tensor:
    """Position ids of coarse tokens; those of references, which stand behind the latent's, stay as they are.

    Args:
        full: (N, A) or (B, N, A) of a full step: row and column are the second and third value.
        geometry: Of the latent.
        multiple: k.
        native: Count on from the first token's as a picture that small does; otherwise the centres of the full patches
            that a coarse one covers.

    Returns:
        On the device of ``full``; its dtype, or float32 where centres may be fractional.
    """
    dtype = full.dtype if native else torch.float32
    rows, columns = geometry.grid(multiple)
    spread = 1 if native else multiple
    row, column = (
        torch.arange(n, device=full.device, dtype=torch.float32) * spread + (spread - 1) / 2 for n in (rows, columns)
    )
    offset = torch.zeros(rows, columns, full.shape[-1], device=full.device)
    offset[..., 1] += row[:, None]
    offset[..., 2] += column
    latent = (full[..., :1, :].float() + offset.flatten(0, 1)).to(dtype)
    return torch.cat([latent, full[..., geometry.tokens(1) :, :].to(dtype)], dim=-2)


def _grid_of(ids: torch.Tensor, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the leading tokens whose first id is that of the very first.

    Args:
        ids: (N, A) float32.
        tokens: In the sequence.
        dtype: In which the ids were made. bfloat16 holds whole numbers up to 256, and pipelines that make ids in it
            place the tokens of larger pictures by what is left of theirs.

    Raises:
        NotCoarseError: they lie on no grid.
    """
    count = int((ids[:, 0] == ids[0, 0]).long().cumprod(0).sum())
    columns = int((ids[:count, 1] == ids[0, 1]).long().cumprod(0).sum())
    rows = count // columns
    plain = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() + ids[0, 1:3]
    if len(ids) != tokens or not torch.equal(ids[:count, 1:3], plain.to(dtype).float()):
        raise NotCoarseError(f"the position ids of {tokens} tokens describe no plain grid")
    return rows, columns


def _prediction(geometry: Geometry, tokens: torch.Tensor, multiple: int) -> torch.Tensor:
    """The latent's part of a sequence at ``multiple``, (B, N, C·2·2) -> (B, C, F, H/k, W/k)."""
    return _unpacked(tokens[:, : geometry.tokens(multiple)], geometry.frames, *geometry.grid(multiple))


def _unpacked(tokens: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
    """(B, frames·rows·columns, C·2·2) as FluxPipeline packs them -> (B, C, F, 2·rows, 2·columns)."""
    layout = "b (f h w) (c p q) -> b c f (h p) (w q)"
    return rearrange(tokens, layout, f=frames, h=rows, w=columns, p=PATCH, q=PATCH)


def _packed(latent: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_unpacked`."""
    return rearrange(latent, "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH)
