"""What accelerate would do to a pipeline, from its configuration alone: no weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import unwrap_module

from ..errors import UnsupportedPipelineError
from ..families import FAMILIES, denoisers, family_of, supported_pipelines
from ..multiples import side_of
from ..runtime import capability_of
from .checks import attention_for
from .loading import default_device, naming, source_of

RANKS = (2, 4, 8)
"""Sizes of a context-parallel group that are looked at."""


@dataclass(frozen=True)
class SizeCost:
    """One patch size.

    Attributes:
        multiple, side: k, and k·p in latent pixels (see :mod:`ddit_rt.multiples` where patches span frames).
        grid: Rows and columns of tokens.
        tokens: Per sample.
        flops: Of one transformer call per sample.
        ranks: Those of :data:`RANKS` among which its tokens divide without padding.
    """

    multiple: int
    side: int
    grid: tuple[int, int]
    tokens: int
    flops: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """How a pipeline divides into tokens.

    Attributes:
        pipeline, family, transformer, scheduler: Class and family names.
        parameters: Of the transformer.
        latent: (channels, frames, height, width) in latent pixels.
        sizes: Cost per multiple that the family can work with, finest first.
        limits: What does not go with it -> why.
        attention: The attention back-end that ``attention="auto"`` takes on this machine, in bfloat16, and why.
    """

    pipeline: str
    family: str
    transformer: str
    scheduler: str
    parameters: int
    latent: tuple[int, int, int, int]
    text_tokens: int
    sizes: tuple[SizeCost, ...]
    limits: Mapping[str, str]
    attention: str


def inspect_pipeline(model: str, height: int, width: int, frames: int = 1, text_tokens: int = 512) -> Inspection:
    """Reads a pipeline's configuration.

    Args:
        model: A name of :data:`~ddit_rt.pipeline.loading.SHIPPED`, a folder in diffusers format, or a hub id.
        height, width: Of the picture, in pixels.
        frames: Of the video; 1 for pictures.
        text_tokens: Tokens of the text condition.

    Raises:
        ConfigError: there is no such pipeline.
        UnsupportedPipelineError: no family runs it; says why.
    """
    source = source_of(model)
    with naming(model):
        pipe = pipeline_of_configs(source)
    family = family_of(pipe)
    transformer = unwrap_module(next(iter(denoisers(pipe, family).values())))
    geometry = family.geometry(pipe, height, width, frames)
    sizes = []
    for multiple in family.multiples:
        tokens = geometry.tokens(multiple)
        cost = family.flops(transformer, geometry, multiple, text_tokens)
        even = tuple(ranks for ranks in RANKS if tokens % ranks == 0)
        sizes.append(
            SizeCost(multiple, side_of(multiple) * geometry.patch, geometry.grid(multiple), tokens, cost, even)
        )
    return Inspection(
        type(pipe).__name__,
        family.name,
        type(transformer).__name__,
        type(pipe.scheduler).__name__,
        sum(parameter.numel() for parameter in transformer.parameters()),
        (geometry.channels, geometry.frames, geometry.height, geometry.width),
        text_tokens,
        tuple(sizes),
        dict(family.limits),
        str(attention_for(transformer, family, capability_of(torch.device(default_device())), torch.bfloat16)),
    )


def supported() -> list[dict[str, Any]]:
    """One entry per family: its name, transformer, pipelines, multiples, and what does not go with it."""
    return [
        {
            "family": family.name,
            "transformer": family.transformer_class.__name__,
            "pipelines": [cls.__name__ for cls in family.pipelines],
            "multiples": family.multiples,
            "limits": dict(family.limits),
        }
        for family in FAMILIES
    ]


def pipeline_of_configs(source: str) -> DiffusionPipeline:
    """A pipeline whose models have no weights (meta tensors); text encoders, tokenizers and processors are missing.

    Args:
        source: A folder in diffusers format, or a hub id.

    Raises:
        UnsupportedPipelineError: no family runs it, or the installed diffusers lacks the pipeline or a model of it.
    """
    index = DiffusionPipeline.load_config(source)
    name = index["_class_name"]
    cls = _class_named(name)
    if not any(issubclass(cls, family.pipelines) for family in FAMILIES):
        raise UnsupportedPipelineError(f"{name} is not supported. {supported_pipelines()}")
    parts: dict[str, Any] = {}
    for name in inspect.signature(cls.__init__).parameters:
        given = index.get(name)
        if isinstance(given, list | tuple) and len(given) == 2:
            library, class_name = given
            if library == "diffusers":
                parts[name] = _without_weights(source, name, class_name)
            else:
                # constructors do without models and tokenizers, but some take a processor apart
                parts[name] = _Processor() if str(class_name).endswith("Processor") else None
        elif name in index:
            parts[name] = given
    return cls(**parts)


class _Processor:
    """In place of a processor, which would need its files and what it reads them with: all its parts are missing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # what Python and diffusers look for in any object
            raise AttributeError(name)


def _without_weights(source: str, name: str, class_name: str) -> Any:
    cls = _class_named(class_name)
    if not issubclass(cls, ModelMixin | SchedulerMixin):
        return cls()
    config = cls.load_config(source, subfolder=name)
    if issubclass(cls, SchedulerMixin):
        return cls.from_config(config)
    with torch.device("meta"):
        return cls.from_config(config)


def _class_named(name: str) -> Any:
    found = getattr(diffusers, name, None)
    if found is None:
        raise UnsupportedPipelineError(
            f"diffusers {diffusers.__version__} has no {name}: a newer one may. {supported_pipelines()}"
        )
    return found
