"""A plain run kept whole on the CPU: what fitting measures a model along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedPipelineError
from ..families import Family, ModelInputs, NotCoarseError, family_of
from .generation import denoise
from .recorder import Recorder, Step, StreamCall


@dataclass(frozen=True)
class Trajectory:
    """One plain run of S steps, all tensors on the CPU and in the pipeline's own layout.

    Attributes:
        sigmas: float32 (S + 1,): noise levels, the one after the last step included.
        outputs: S predictions as the scheduler got them, guidance applied, float32.
        latents: S latents as the scheduler returned them, the pipeline's dtype.
        transformers: Which transformer made each step, as its place among the pipeline's.
        predictions: Per step and stream, what the transformer returned, the pipeline's dtype: a tensor, or a list of
            one per sample.
        family, module, inputs: A transformer, its family, and what it was first given: how to read ``outputs``.
        arguments: Of the pipeline, prompt included.
        seed: Of the noise, which a CPU generator drew.
    """

    sigmas: torch.Tensor
    outputs: list[torch.Tensor]
    latents: list[torch.Tensor]
    transformers: list[int]
    predictions: list[list[Any]]
    family: Family
    module: nn.Module
    inputs: ModelInputs
    arguments: Mapping[str, Any]
    seed: int

    @property
    def steps(self) -> int:
        return len(self.outputs)

    def canonical(self, output: torch.Tensor) -> torch.Tensor:
        """A prediction in the pipeline's layout as float32 (B, C, F, H, W)."""
        return self.family.canonical(self.module, self.inputs, output).float()


def record_trajectory(pipe: Any, seed: int, **arguments: Any) -> Trajectory:
    """Runs a pipeline plainly and keeps the whole run.

    Args:
        pipe: A supported pipeline; left plain.
        seed: Of the noise.
        **arguments: Of the pipeline, but for generator and output type.

    Raises:
        UnsupportedPipelineError: no family knows the pipeline, or it calls its transformer in a way that coarse tokens
            cannot carry, or the transformer makes more than a picture.
    """
    family = family_of(pipe)
    if family.companion_scheduler:
        raise UnsupportedPipelineError(
            f"no schedule can be fitted to {type(pipe).__name__}: a trajectory holds one output, and its transformer "
            "makes two. Give schedule=, or speedup=, which needs no fit."
        )
    first: list[tuple[nn.Module, ModelInputs]] = []

    def keep_call(call: StreamCall) -> Any:
        if not first:
            assert call.inputs is not None  # the recorder parses
            first.append((call.module, call.inputs))
        return pytree.tree_map(torch.Tensor.cpu, call.prediction)

    def keep_step(step: Step[Any]) -> tuple[torch.Tensor, torch.Tensor, int, list[Any]]:
        return step.output.float().cpu(), step.next_latents.cpu(), step.transformer, step.calls

    try:
        sigmas, steps = Recorder(pipe, family).record(lambda: denoise(pipe, seed, arguments), keep_call, keep_step)
    except NotCoarseError as error:
        raise UnsupportedPipelineError(f"no schedule can be fitted to this call: {error}.") from error
    outputs, latents, transformers, predictions = (list(column) for column in zip(*steps))
    return Trajectory(sigmas, outputs, latents, transformers, predictions, family, *first[0], arguments, seed)
