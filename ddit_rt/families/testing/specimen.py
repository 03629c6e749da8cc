"""A tiny pipeline of a family and how to call it: all that the kit needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import nn


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
    """

    name: str
    make: Callable[[], Any]
    call: MakeCall
    size: tuple[int, int] = (64, 64)
    odd: tuple[int, int] = (72, 40)
    latents: Callable[[torch.Tensor], torch.Tensor] | None = None
    guided: bool = True
    batches: bool = True

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
