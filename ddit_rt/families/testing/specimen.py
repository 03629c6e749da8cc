"""A tiny pipeline of a family and how to call it: all that the kit needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .. import Family, ModelInputs, denoisers, family_of


class MakeCall(Protocol):
    """Makes the arguments of a pipeline call, fresh ones every time, generators included."""

    def __call__(
        self, *, batch: int = 1, height: int, width: int, guided: bool = False, images: int = 1, steps: int = 8
    ) -> dict[str, Any]:
        """Arguments by name, for a call that returns latents.

        Args:
            batch: Prompts.
            height, width: In pixels.
            guided: With guidance that runs the model for a negative prompt too.
            images: Per prompt.
            steps: Denoising steps.
        """


@dataclass(frozen=True)
class Specimen:
    """A family's pipeline, as small as it can be.

    Attributes:
        name: Of the specimen, as ``"flux2-klein"``.
        make: Makes the pipeline: random weights in every layer (:func:`randomise`), the same every time.
        call: Makes the arguments of a call.
        size: Height and width in pixels of a grid that 4 divides, with at least 8 tokens either way.
        odd: Height and width of a grid that 2 does not divide.
        latents: Brings noise (B, C, F, H, W) to what the pipeline takes as ``latents``; None if it takes none.
        guided: Whether there is guidance with a negative prompt.
        batches: Whether a call may have several prompts, and several images per prompt.
        multiples: Coarse sizes that its grid is large enough for.
        self_similar: Whether the conditions of a call at half the size are those at the full size; pictures that an
            autoencoder encodes are not.
        limits: As :attr:`Family.limits`, for this kind of pipeline alone.
    """

    name: str
    make: Callable[[], Any]
    call: MakeCall
    size: tuple[int, int] = (64, 64)
    odd: tuple[int, int] = (72, 40)
    latents: Callable[[torch.Tensor], torch.Tensor] | None = None
    guided: bool = True
    batches: bool = True
    multiples: tuple[int, ...] = (2, 4)
    self_similar: bool = True
    limits: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def family(self) -> Family:
        """The family of its pipeline."""
        return family_of(self.make())

    @property
    def schedule(self) -> list[int]:
        """Full, coarse and skipped steps for a call of eight."""
        return [kind if kind in (0, 1, *self.multiples) else self.multiples[0] for kind in (1, 1, 2, 4, 1, 0, 2, 1)]

    def arguments(self, **options: Any) -> dict[str, Any]:
        """Arguments of a call at the specimen's size unless told otherwise; options of :class:`MakeCall`."""
        height, width = self.size
        return self.call(**{"height": height, "width": width, **options})


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.15) -> nn.Module:
    """Gives every parameter normal noise, zero-initialised ones too, so that outputs depend on all inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval().requires_grad_(False)


def run(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> torch.Tensor:
    """The first thing that a pipeline call returns, a tensor of latents."""
    result = pipe(**arguments)
    found = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"the call returned {type(found).__name__}: it has to ask for latents.")
    return found


class _CaughtError(Exception):
    """Ends a pipeline call whose transformer's arguments have been seen."""


@dataclass(frozen=True)
class Caught:
    """One call of a transformer, as its pipeline makes it.

    Attributes:
        pipe, family, module: The pipeline, its family, and the transformer.
        arguments: Of the call, by name.
        call: What the family reads in them.
        sigma: Noise level that the transformer is told.
    """

    pipe: Any
    family: Family
    module: nn.Module
    arguments: dict[str, Any]
    call: ModelInputs
    sigma: float


def first_call(specimen: Specimen, **options: Any) -> Caught:
    """The first transformer call of a plain pipeline call; options as of :class:`MakeCall`."""
    pipe = specimen.make()
    family = family_of(pipe)
    module = next(iter(denoisers(pipe, family).values()))
    seen: list[dict[str, Any]] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(family.bind(args, kwargs))
        raise _CaughtError

    with torch.no_grad(), suppress(_CaughtError), removed(module.register_forward_pre_hook(see, with_kwargs=True)):
        run(pipe, specimen.arguments(**options))
    zero, one, given = (float(t) for t in (family.time_of(0.0), family.time_of(1.0), family.told_time(seen[0])))
    sigma = (given - zero) / (one - zero)
    return Caught(pipe, family, module, seen[0], family.parse(module, seen[0]), sigma)


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Removes a hook at the end of the context."""
    try:
        yield
    finally:
        handle.remove()
