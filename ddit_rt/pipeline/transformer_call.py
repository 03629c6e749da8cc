"""One call of the transformer by the pipeline, and what running it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..families import Family, ModelInputs
from ..granularity import Models, VariancePreserving
from ..runtime import CacheState, TeaCache, substituted
from .modulation import Modulation

TEXT_PARTS, LEAST_TEXT = 16, 4
"""Text that is trimmed keeps a multiple of this part of its length, and of at least so many tokens."""


class PromptText:
    """The tokens of a pipeline call's prompts, as long as its steps are given the embeddings that it began with.

    Args:
        tokens: Of the longest prompt.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._begun: dict[int, tuple[torch.Tensor, int]] = {}

    def of(self, step: int, ordinal: int, text: torch.Tensor) -> int | None:
        """How many tokens of a call's text hold it; None where that is not known, as of what a callback has exchanged.

        Args:
            step: From 0.
            ordinal: Of the call in its step.
            text: What the transformer is given, (B, N, C).
        """
        version = 0 if text.is_inference() else text._version
        if step == 0:
            self._begun[ordinal] = text, version
        begun, before = self._begun.get(ordinal, (None, 0))
        return self._tokens if begun is text and before == version else None


@dataclass(frozen=True)
class TransformerCall:
    """One call of the transformer by the pipeline. Guidance makes two in a step.

    It holds nothing of the pipeline call's state, so that a full step's call may outlive its step: a later probe runs
    the model once more as that step did.

    Attributes:
        base: The transformer, without a compiler's wrapping.
        arguments: Of the call, by name.
        inputs: What the family read in them; None if the call cannot run coarsely.
        step: Denoising step, from 0.
        steps: How many there are.
        sigma: Noise level of the step, a flow's.
        level: The same as a 0-dim tensor where the latents are: a captured graph can take it as an input.
        process: What turns flow states and velocities into the model's latents and predictions; None for a flow.
        inner: The transformer's forward, as it was before it was patched.
        in_context: (multiple, probe?) -> the same in the context of diffusers' cache; None without such a cache.
        obstacle: Why its runs cannot be captured, if the caller knows a reason.
        cache: Multiple -> TeaCache and what it remembers; None without TeaCache. Probes pass it by.
        ahead: (arguments of a call, multiple) -> what the transformer's modulations are in it at this step; None where
            it makes them itself.
        text: Tokens that hold text, which coarse runs keep; None keeps all.
    """

    base: nn.Module
    arguments: dict[str, Any]
    inputs: ModelInputs | None
    step: int
    steps: int
    sigma: float
    level: torch.Tensor
    process: VariancePreserving | None
    inner: Callable[..., Any]
    in_context: Callable[[int, bool], Callable[..., Any]] | None = None
    obstacle: str = ""
    cache: Callable[[int], tuple[TeaCache, CacheState]] | None = None
    ahead: Callable[[Mapping[str, Any], int], Modulation | None] | None = None
    text: int | None = None

    def trimmed(self, family: Family) -> ModelInputs:
        """What coarse runs get of the call: with the text that it says, a little more, or all of it."""
        inputs = self.inputs
        assert inputs is not None
        whole = int(inputs.arguments["encoder_hidden_states"].shape[1]) if self.text is not None else 0
        if self.text is None or self.text >= whole:
            return inputs
        step = max(whole // TEXT_PARTS, LEAST_TEXT)  # every length is a graph of its own
        kept = -(-self.text // step) * step
        return inputs if kept >= whole else family.trimmed(inputs, kept)

    def modulated(self, multiple: int, run: Callable[..., Any], given: Any) -> tuple[Callable[..., Any], Any]:
        """``run`` and its input (its last argument), with modulations made ahead among the input's tensors."""
        found = None if self.ahead is None else self.ahead(self.arguments, multiple)
        if found is None:
            return run, given

        def modulated(*arguments: Any) -> Any:
            *first, inputs = arguments
            with substituted(self.base, found.results(inputs["modulation"])):
                return run(*first, inputs["given"])

        return modulated, {"given": given, "modulation": found.values}


@dataclass(frozen=True)
class CallModels(Models):
    """How a path reaches the model, and the call that it would be reached through."""

    call: TransformerCall = field(kw_only=True)


@dataclass(frozen=True)
class StepResult:
    """What one transformer call of a step came to.

    Attributes:
        output: What the pipeline gets back.
        prediction: The model's prediction, float32 (B, C, F, H, W); None for a full step, whose output holds it.
        flops: Floating-point operations spent, probes included.
        full_flops: What they would have been at multiple 1.
        replayed: Whether captured graphs computed all of it.
        blocks_skipped: TeaCache skipped the transformer's blocks.
        ran_model: Whether the model ran, blocks or no blocks.
        companion: What a model run predicted of a second output, see ``Family.companion``; None where there is none.
        fused: Kernels stood in for the transformer's ends.
    """

    output: Any
    prediction: torch.Tensor | None
    flops: float
    full_flops: float
    replayed: bool
    blocks_skipped: bool = False
    ran_model: bool = True
    companion: torch.Tensor | None = None
    fused: bool = False
