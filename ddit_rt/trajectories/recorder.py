"""The one recorder of plain runs. Fitting, distillation and TeaCache's calibration all watch the model through it.

A *trajectory* is one plain run of S denoising steps. A *stream* is one of the transformer's calls per step: guidance
has a conditional and an unconditional one. A pipeline makes a step like this, and the recorder looks on where marked::

    for t in scheduler.timesteps:
        prediction = transformer(latents, t, prompt, ...)          # StreamCall of stream 0
        negative = transformer(latents, t, negative_prompt, ...)   # StreamCall of stream 1
        output = negative + scale * (prediction - negative)
        latents = scheduler.step(output, t, latents)               # Step

What is seen are the live tensors, on the model's device. Nothing of them is kept but what two functions of the caller
return: ``keep_call`` right after each transformer call, ``keep_step`` after each scheduler step. A caller that wants
the whole run moves it to the CPU there; one that wants a number per step computes it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..errors import ConfigError, UnsupportedPipelineError
from ..families import Family, ModelInputs, denoisers, raw_sample
from ..pipeline import restore
from ..schedule import latent_of, predicts_flow
from .interception import intercepted

KeptCall = TypeVar("KeptCall")
KeptStep = TypeVar("KeptStep")


@dataclass(frozen=True)
class StreamCall:
    """One call of a transformer: one stream of one step.

    Attributes:
        step: Index of the step, from 0.
        stream: Which of the step's transformer calls this is, from 0.
        transformer: Which of the pipeline's transformers was called, as its place among them.
        module: That transformer, without what wraps it.
        arguments: What it was called with, by name.
        inputs: The arguments as the family reads them, with the latent in canonical layout; None if ``parse`` is off.
        prediction: What it returned, in the pipeline's own layout and dtype.
    """

    step: int
    stream: int
    transformer: int
    module: nn.Module
    arguments: Mapping[str, Any]
    inputs: ModelInputs | None
    prediction: torch.Tensor


@dataclass(frozen=True)
class Step(Generic[KeptCall]):
    """One denoising step, all its tensors in the pipeline's own layout and dtype.

    Attributes:
        index: From 0, at the first step of this call, wherever in the scheduler's range that is.
        timestep: As the pipeline gave it to the scheduler.
        sigma: Noise level of ``latents``.
        latents: What the scheduler's step began from.
        output: The prediction as the scheduler got it, guidance applied.
        next_latents: What the scheduler's step returned.
        transformer: Which of the pipeline's transformers made the step, as its place among them.
        calls: What ``keep_call`` returned for each stream.
    """

    index: int
    timestep: float
    sigma: float
    latents: torch.Tensor
    output: torch.Tensor
    next_latents: torch.Tensor
    transformer: int
    calls: list[KeptCall]


class _EnoughError(Exception):
    """Ends a pipeline call once the steps that were asked for are recorded."""


class Recorder:
    """Watches a plain pipeline where it meets its transformers and its scheduler.

    Args:
        pipe: A supported pipeline; whatever acceleration it has is taken off.
        family: Of its transformers.
        parse: Read every call as its family does. A call that could not run on coarse tokens then ends the run, before
            the model runs.

    Raises:
        UnsupportedPipelineError: the model predicts noise or v; what is made of recordings is made of flows.
    """

    def __init__(self, pipe: Any, family: Family, parse: bool = True) -> None:
        if not predicts_flow(pipe.scheduler):
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} predicts no flow: its runs cannot be "
                "recorded, so nothing can be fitted, calibrated or distilled for it yet. speedup=, quality=, "
                "threshold= and schedule= need no recording."
            )
        restore(pipe)
        self._pipe, self._family, self._parse = pipe, family, parse

    @torch.no_grad()
    def record(
        self,
        run: Callable[[], Any],
        keep_call: Callable[[StreamCall], KeptCall],
        keep_step: Callable[[Step[KeptCall]], KeptStep],
        max_steps: int | None = None,
    ) -> tuple[torch.Tensor, list[KeptStep]]:
        """Watches one run.

        Args:
            run: Calls the pipeline, or one that shares its transformers and scheduler; its result is not used.
            keep_call: What to keep of a transformer call. Called before the pipeline gets the prediction, so it may
                not change it, and a tensor that is kept should be a copy if the pipeline could write to it.
            keep_step: What to keep of a step.
            max_steps: End the run after so many steps; None for all.

        Returns:
            Noise levels float32 (S + 1,) on the CPU, the one after the last recorded step included, and what
            ``keep_step`` returned for the S steps.

        Raises:
            NotCoarseError: ``parse`` is on, and the transformer is called in a way that coarse tokens cannot carry.
            UnsupportedPipelineError: the run made no step of this pipeline's scheduler.
            ConfigError: ``max_steps`` is below 1.
        """
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"max_steps={max_steps}: record at least 1, or None for all.")
        pipe, family = self._pipe, self._family
        modules = [unwrap_module(module) for module in denoisers(pipe, family).values()]
        steps: list[KeptStep] = []
        calls: list[KeptCall] = []
        latest = position = 0

        def on_forward(place: int, arguments: dict[str, Any], proceed: Callable[[], Any]) -> Any:
            nonlocal latest
            inputs = family.parse(modules[place], arguments) if self._parse else None
            raw = proceed()
            call = StreamCall(len(steps), len(calls), place, modules[place], arguments, inputs, raw_sample(raw))
            calls.append(keep_call(call))
            latest = place
            return raw

        def on_step(
            output: torch.Tensor, timestep: Any, latents: torch.Tensor, proceed: Callable[[torch.Tensor], Any]
        ) -> Any:
            nonlocal calls, position
            result = proceed(output)
            # the scheduler counts from the start of its own range, where image-to-image does not begin
            position = pipe.scheduler.step_index - 1
            sigma = float(pipe.scheduler.sigmas[position])
            step = Step(len(steps), float(timestep), sigma, latents, output, latent_of(result), latest, calls)
            steps.append(keep_step(step))
            calls = []
            if len(steps) == max_steps:
                raise _EnoughError
            return result

        with intercepted(pipe, family, on_forward, on_step):
            try:
                run()
            except _EnoughError:
                if hasattr(pipe, "maybe_free_model_hooks"):
                    pipe.maybe_free_model_hooks()
        if not steps:
            raise UnsupportedPipelineError(
                f"nothing to record: the run made no step of this {type(pipe).__name__}'s scheduler. It has to call "
                "this pipeline, or one that shares its transformer and scheduler."
            )
        sigmas = pipe.scheduler.sigmas[position - len(steps) + 1 : position + 2]
        return sigmas.float().cpu(), steps
