"""Where a pipeline meets its transformers and its scheduler: the only two places at which a run is watched or changed.

The pipeline itself goes on as it is. So guidance, image conditions and the scheduler's arithmetic in everything that
is recorded or replayed are those of the real pipeline, whatever its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..families import Family, denoisers
from ..runtime import MethodPatch, installed

OnForward = Callable[[int, dict[str, Any], Callable[[], Any]], Any]
"""(place of the transformer among the pipeline's, arguments by name, run the model) -> what the pipeline gets."""

OnStep = Callable[[torch.Tensor, Any, torch.Tensor, Callable[[torch.Tensor], Any]], Any]
"""(model output, timestep, latent, run the scheduler on a model output) -> what the pipeline gets."""


@contextmanager
def intercepted(
    pipe: Any, family: Family, on_forward: OnForward | None = None, on_step: OnStep | None = None
) -> Iterator[None]:
    """Routes transformer calls and scheduler steps through handlers for the length of a ``with`` block.

    Args:
        pipe: Owner of transformers and scheduler; may be accelerated, then the handlers see what it makes of a step.
        family: Of its transformers.
        on_forward: Called in place of a transformer.
        on_step: Called in place of the scheduler's ``step``.
    """
    patches = []
    if on_step is not None:
        patches.append(MethodPatch(pipe.scheduler, "step", _step_handler(on_step)))
    if on_forward is not None:
        modules = denoisers(pipe, family).values()
        patches += [_forward_patch(module, place, family, on_forward) for place, module in enumerate(modules)]
    with installed(patches):
        yield


def _forward_patch(module: nn.Module, place: int, family: Family, on_forward: OnForward) -> MethodPatch:
    def handle(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_forward(place, family.bind(args, kwargs), lambda: inner(*args, **kwargs))

    return MethodPatch(module, "forward", handle)


def _step_handler(on_step: OnStep) -> Callable[..., Any]:
    # the names are those of diffusers: pipelines may pass them by keyword
    def handle(
        inner: Callable[..., Any], model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return on_step(model_output, timestep, sample, lambda output: inner(output, timestep, sample, *args, **kwargs))

    return handle
