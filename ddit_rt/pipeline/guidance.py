"""The two calls of a guided step in one batch.

The pipeline calls the transformer for the prompt, then for the negative prompt. When the first call comes, the second
is not there yet; but it will be given what it was given in the last step, with the latent and the noise level that the
first is given now. So the first runs both, and what the second comes to is kept until it comes. If it comes with
something else, what was kept is thrown away, and it runs by itself.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..families import Expectation, Family, Joiner, ModelInputs, NotCoarseError, NotJoinedError, expected_second
from ..granularity import Anchor, PredictionHistory
from ..runtime import interventions, is_parallel, wrapped_forward
from .executor import StepExecutor
from .transformer_call import CallModels, StepResult, TransformerCall

logger = logging.getLogger(__name__)

MOST_MISSES = 2
"""Second calls of a pipeline call that were not as expected, after which its steps run their calls apart."""


@dataclass(frozen=True)
class _Seen:
    """A call of the current or the last step, and what intervened in the model (guidance may skip layers in one)."""

    call: TransformerCall
    model: list[tuple[object, ...]]


@dataclass(frozen=True)
class _Kept:
    """What a second call that has not come yet came to."""

    expectation: Expectation
    valueless: frozenset[str]
    result: StepResult


class BatchedGuidance:
    """Of one pipeline call.

    Args:
        family: Of the transformer.
        executor: Runs the joined calls.
        full: Full steps, too, and not only coarse ones.

    Attributes:
        reason: Why the calls of the current step run apart, if they could be one; empty otherwise.
    """

    def __init__(self, family: Family, executor: StepExecutor, full: bool) -> None:
        self.reason = ""
        self._family = family
        self._executor = executor
        self._full = full
        self._joiner = Joiner(family)
        self._calls: list[_Seen] = []
        self._kept: _Kept | None = None
        self._misses = 0
        self._off = ""
        self._anchors: dict[tuple[int, int], tuple[Anchor, Anchor, Anchor]] = {}

    def first(
        self, call: TransformerCall, histories: tuple[PredictionHistory, PredictionHistory], multiple: int
    ) -> StepResult | None:
        """Runs the first call of a step, and the one to come with it if that can be.

        Args:
            call: The call.
            histories: Of the first and the second call of the steps.
            multiple: Of the step; at 0 nothing runs.

        Returns:
            Of the first call, with the FLOP of both; None: nothing ran.
        """
        if self._kept is not None:
            self._miss()
        seen = _Seen(call, interventions(call.base))
        before, self._calls, self.reason = self._calls, [seen], ""
        if multiple == 0 or (multiple == 1 and not self._full):
            return None
        # a step of one call has nothing to join, nor has the first with another transformer
        if len(before) != 2 or any(earlier.call.base is not call.base for earlier in before):
            return None
        self.reason = self._off or _obstacle(call)
        if any(earlier.model != seen.model for earlier in before):
            self.reason = self.reason or "the model's layers were hooked otherwise in the last step's calls"
        if self.reason:
            return None
        try:
            return self._both(call, [earlier.call for earlier in before], histories, multiple)
        except (NotJoinedError, NotCoarseError) as error:
            self.reason = str(error)
        except torch.OutOfMemoryError:
            self.reason = self._off = "both in one batch take more memory than there is"
            logger.warning("the two calls of guidance run apart: %s", self._off)
        return None

    def further(self, call: TransformerCall) -> StepResult | None:
        """What a further call of the step came to, if it ran with the first; None: it has to run."""
        seen = _Seen(call, interventions(call.base))
        self._calls.append(seen)
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        if seen.model == self._calls[0].model and kept.expectation.met_by(call.arguments, kept.valueless):
            return kept.result
        self._miss()
        self.reason = "the second call was not what it was in the last step, and ran once more"
        return None

    def _miss(self) -> None:
        self._kept = None
        self._misses += 1
        if self._misses >= MOST_MISSES:
            self._off = f"the second call was not as expected {self._misses} times"

    def _both(
        self,
        call: TransformerCall,
        before: Sequence[TransformerCall],
        histories: tuple[PredictionHistory, PredictionHistory],
        multiple: int,
    ) -> StepResult:
        family = self._family
        arguments = expected_second(family, (before[0].arguments, before[1].arguments), call.arguments)
        second = replace(call, arguments=arguments, inputs=family.parse(call.base, arguments), text=before[1].text)
        self._joiner.begin()
        joint = self._joined(call, second)
        halves = (
            self._full_halves(joint, call, second)
            if multiple == 1
            else self._coarse_halves(joint, call, second, self._history(*histories, multiple), multiple)
        )
        # coarse runs are told the step's noise level, whatever the call says, unless it has one per token
        told = call.arguments[family.time_argument]
        valueless = frozenset({family.time_argument} if multiple > 1 and told.ndim < 2 else ())
        self._kept = _Kept(Expectation(arguments), valueless, replace(halves[1], flops=0.0))
        return halves[0]

    def _full_halves(self, joint: TransformerCall, *calls: TransformerCall) -> list[StepResult]:
        result = self._executor.full(joint)
        assert joint.inputs is not None
        parts = self._family.output(joint.base, joint.inputs, result.output).chunk(len(calls))
        outputs = [self._family.wrap(one.base, _inputs(one), part) for one, part in zip(calls, parts)]
        return [replace(result, output=output, full_flops=result.full_flops / len(calls)) for output in outputs]

    def _coarse_halves(
        self,
        joint: TransformerCall,
        first: TransformerCall,
        second: TransformerCall,
        history: PredictionHistory,
        multiple: int,
    ) -> list[StepResult]:
        result = self._executor.coarse(joint, history, multiple)
        for one, other, both in self._anchors.values():
            # what the joined run learnt of the full steps is known to either call
            if multiple in both.residuals:
                one.residuals[multiple], other.residuals[multiple] = both.residuals[multiple].chunk(2)
        assert result.prediction is not None
        full = result.full_flops / 2
        return [
            replace(result, output=self._executor.answer(one, part), prediction=part, full_flops=full)
            for one, part in zip((first, second), result.prediction.chunk(2))
        ]

    def _joined(self, first: TransformerCall, second: TransformerCall) -> TransformerCall:
        latent = _inputs(first).latent
        arguments = self._joiner.joined(first.arguments, second.arguments, latent.shape[0])
        # inference tensors are joined anew in every step, and what was made ahead is known by the tensors it read
        ahead = None if latent.is_inference() else first.ahead
        text = None if second.text is None else first.text  # what is known of both
        inputs = self._family.parse(first.base, arguments)
        return replace(first, arguments=arguments, inputs=inputs, ahead=ahead, text=text)

    def _history(self, first: PredictionHistory, second: PredictionHistory, multiple: int) -> PredictionHistory:
        """What both calls remember of the last full steps, as one would that had made both."""
        count = self._executor.path.anchors
        firsts, seconds = ([*history.anchors][-count:] if count else [] for history in (first, second))
        if [anchor.sigma for anchor in firsts] != [anchor.sigma for anchor in seconds]:
            raise NotJoinedError("guidance began in mid-run, and the two calls remember other full steps")
        known, self._anchors = self._anchors, {}
        for pair in zip(firsts, seconds):
            key = (id(pair[0]), id(pair[1]))
            self._anchors[key] = known.get(key) or (*pair, _joined_anchor(*pair))
        for one, other, both in self._anchors.values():
            if multiple in one.residuals and multiple in other.residuals:
                both.residuals[multiple] = torch.cat([one.residuals[multiple], other.residuals[multiple]])
            else:  # a probe repeats the calls of that step
                assert isinstance(one.models, CallModels) and isinstance(other.models, CallModels)
                both.models = replace(one.models, call=self._joined(one.models.call, other.models.call))
        return PredictionHistory(deque(both for _, _, both in self._anchors.values()))


def _inputs(call: TransformerCall) -> ModelInputs:
    assert call.inputs is not None
    return call.inputs


def _joined_anchor(first: Anchor, second: Anchor) -> Anchor:
    latent, prediction = (
        torch.cat(pair) for pair in ((first.latent, second.latent), (first.prediction, second.prediction))
    )
    return Anchor(first.sigma, latent, prediction, first.models)


def _obstacle(call: TransformerCall) -> str:
    """Why a call has to run by itself."""
    if call.inputs is None:
        return "it cannot be read what a call holds"
    if call.in_context is not None or call.cache is not None:
        return "a cache decides for each call by itself"
    if is_parallel(call.base):
        return "the tokens are divided among ranks"
    return wrapped_forward(call.inner, call.base) if not hasattr(call.base, "_hf_hook") else ""
