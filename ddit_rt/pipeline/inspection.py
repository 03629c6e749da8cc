"""What accelerate would do to a pipeline, from its configuration alone: no weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..config import SUPPORTED_MULTIPLES
from ..errors import UnsupportedPipelineError
from ..families import FAMILIES, Family
from .loading import naming, source_of


@dataclass(frozen=True)
class SizeCost:
    """One patch size: ``tokens`` per sample and the FLOP of one transformer call per sample."""

    multiple: int
    side: int
    grid: tuple[int, int]
    tokens: int
    flops: float


@dataclass(frozen=True)
class Inspection:
    """How a pipeline divides into tokens.

    Attributes:
        pipeline, family, transformer, scheduler: Class and family names.
        parameters: Of the transformer.
        latent: (channels, frames, height, width) in latent pixels.
        sizes: Cost per multiple, finest first.
    """

    pipeline: str
    family: str
    transformer: str
    scheduler: str
    parameters: int
    latent: tuple[int, int, int, int]
    text_tokens: int
    sizes: tuple[SizeCost, ...]


def inspect_pipeline(model: str, height: int, width: int, frames: int = 1, text_tokens: int = 512) -> Inspection:
    """Reads a pipeline's configuration.

    Args:
        model: A name of :data:`~ddit_rt.pipeline.loading.SHIPPED`, a folder in diffusers format, or a hub id.
        height, width: Of the picture, in pixels.
        frames: Of the video; 1 for pictures.
        text_tokens: Tokens of the text condition.

    Raises:
        ConfigError: there is no such pipeline.
        UnsupportedPipelineError: no family knows the pipeline's class.
    """
    source = source_of(model)
    with naming(model):
        index = DiffusionPipeline.load_config(source)
        name = index["_class_name"]
        family = _family_named(name)
        component = next(c for c in family.components if index.get(c, [None])[0] is not None)
        config = family.transformer_class.load_config(source, subfolder=component)
        vae = getattr(diffusers, index["vae"][1]).load_config(source, subfolder="vae")
    with torch.device("meta"):
        transformer = family.transformer_class.from_config(config)
    geometry = family.geometry(_stub(vae, transformer), height, width, frames)
    sizes = []
    for multiple in SUPPORTED_MULTIPLES:
        cost = family.flops(transformer, geometry, multiple, text_tokens)
        side = multiple * geometry.patch
        sizes.append(SizeCost(multiple, side, geometry.grid(multiple), geometry.tokens(multiple), cost))
    return Inspection(
        name,
        family.name,
        family.transformer_class.__name__,
        index["scheduler"][1],
        sum(parameter.numel() for parameter in transformer.parameters()),
        (geometry.channels, geometry.frames, geometry.height, geometry.width),
        text_tokens,
        tuple(sizes),
    )


def _family_named(name: str) -> Family:
    for family in FAMILIES:
        if name in (cls.__name__ for cls in family.pipelines):
            return family
    known = ", ".join(cls.__name__ for family in FAMILIES for cls in family.pipelines)
    raise UnsupportedPipelineError(f"{name} is not supported. Supported pipelines: {known}.")


def _stub(vae: Mapping[str, Any], transformer: Any) -> SimpleNamespace:
    """What Family.geometry reads of a pipeline, without its weights; ``vae`` is the configuration of its VAE."""
    return SimpleNamespace(
        transformer=transformer,
        vae_scale_factor=2 ** (len(vae.get("block_out_channels", (0,))) - 1),
        vae_scale_factor_spatial=vae.get("scale_factor_spatial", 8),
        vae_scale_factor_temporal=vae.get("scale_factor_temporal", 4),
    )
