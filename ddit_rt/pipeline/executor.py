"""Executes one call of the transformer at one multiple, from latent to prediction: full, coarse or skipped.

What a captured graph can hold is a function of nothing but tensors: embedding, trunk and de-embedding, with all that a
coarse path does around them. Whatever changes from step to step enters as a tensor, the noise level too; eager
execution takes the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..families import Family, ModelInputs
from ..granularity import (
    Anchor,
    CoarsePath,
    FusedEnds,
    Geometry,
    Models,
    PatchEnds,
    PredictionHistory,
    Scalar,
    VariancePreserving,
)
from ..multiples import SKIP
from ..runtime import GraphRunner
from .coarse_weights import CoarseWeights
from .fusing import Forwards, Fusing
from .transformer_call import CallModels, StepResult, TransformerCall


@dataclass
class _Execution:
    """How a call has been executed so far."""

    replayed: bool = True
    blocks_skipped: bool = False
    fused: bool = False


class StepExecutor:
    """Executes calls, through graphs if there is a runner for them.

    Args:
        family: Of the transformer.
        path: What a coarse step computes.
        native: See ``DDiTConfig.positions``.
        graphs: Runner, or None to run eagerly.
        merged: Multiples whose LoRA is merged into copies of the weights.
        backend: See ``DDiTConfig.backend``: where kernels run, coarse steps have the transformer's ends fused.
        fused_full: Full steps, too.
    """

    def __init__(
        self,
        family: Family,
        path: CoarsePath,
        native: bool,
        graphs: GraphRunner | None,
        merged: Sequence[int] = (),
        backend: str = "torch",
        fused_full: bool = False,
    ) -> None:
        self.graphs = graphs
        self.path = path
        self._family = family
        self._native = native
        self._weights = CoarseWeights(family, path, merged)
        self._fusing = Fusing(family, backend)
        self._fused_full = fused_full
        # whether there is anything to look over before a call
        self.watches = path.adapter is not None or graphs is not None
        self._costs: dict[tuple[int, Geometry, int, int], float] = {}

    def begin_call(self) -> None:
        """A pipeline call begins: weights that leave no trace of a change are read again when first used in it."""
        self._weights.begin_call()

    def refresh(self, base: nn.Module, inputs: ModelInputs | None) -> None:
        """Notices changed weights and switches; for the time before the decision, when the host only waits."""
        if inputs is not None:
            self._weights.refresh(base, inputs)
        if self.graphs is not None:
            adapter = self.path.adapter
            self.graphs.refresh(base, *(() if adapter is None else (adapter,)))

    def full(self, call: TransformerCall) -> StepResult:
        """The transformer's own result at multiple 1."""

        def run(at: Forwards, arguments: dict[str, Any]) -> Any:
            return at(1)(**arguments)

        done, inputs = _Execution(), call.inputs
        if inputs is None:
            raw = self._full(call, done, run)
            return StepResult(raw, None, 0.0, 0.0, done.replayed, done.blocks_skipped)
        # a second output has no place in what the ends give
        done.fused = self._fused_full and not self._family.companion_scheduler
        done.fused = done.fused and self._fusing.is_possible(call, 1, own=True)
        if done.fused:

            def run_fused(at: Forwards, given: dict[str, Any]) -> torch.Tensor:
                return self._fusing.full(call.base, replace(inputs, **given), at)

            function, given = call.modulated(1, run_fused, self._tensors_of(inputs))
            prediction = self._through_cache(call, done, 1, ("full", "fused"), (call.base,), function, given)
            raw = self._family.wrap(call.base, inputs, prediction)
        else:
            raw = self._full(call, done, run)
        cost = self._flops(call, inputs, 1)
        spent = 0.0 if done.blocks_skipped else cost
        companion = self._family.companion(raw)
        return StepResult(
            raw, None, spent, cost, done.replayed, done.blocks_skipped, companion=companion, fused=done.fused
        )

    def _full(self, call: TransformerCall, done: _Execution, run: Callable[[Forwards, dict[str, Any]], Any]) -> Any:
        function, given = call.modulated(1, run, call.arguments)
        return self._through_cache(call, done, 1, "full", (call.base,), function, given)

    def anchor(self, call: TransformerCall, raw: Any) -> Anchor:
        """What later coarse steps need of a full one, from its raw result."""
        inputs = call.inputs
        assert inputs is not None
        reached = self._models(call, inputs, call.process, _forwards(call, probe=True), fused=False)
        models = CallModels(reached.low, reached.tokens, call=call)
        state, prediction = self._state(call, inputs), self._family.output(call.base, inputs, raw)
        if call.process is not None:
            prediction = call.process.velocity(prediction.float(), state, call.sigma)
        return Anchor(call.sigma, state, prediction, models)

    def coarse(self, call: TransformerCall, history: PredictionHistory, multiple: int) -> StepResult:
        """A coarse step by the coarse path."""
        assert call.inputs is not None
        path, inputs = self.path, self._placed(call.trimmed(self._family), multiple)
        done, flops = _Execution(), 0.0
        done.fused = fused = self._is_fused(call, multiple)
        anchors = list(history.anchors)[-path.anchors :] if path.anchors else []
        for anchor in reversed(anchors[-path.probes :] if path.probes else []):
            if multiple not in anchor.residuals:
                anchor.residuals[multiple] = self._probe(anchor, multiple, done)
                flops += self._flops(call, inputs, multiple)

        def run(at: Forwards, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            companions: list[torch.Tensor] = []
            here, process = replace(inputs, **given["inputs"]), _process(call, given)
            models = self._models(call, here, process, self._watched(at, companions), fused)
            anchors = deque([_anchor(tensors, multiple, models) for tensors in given["anchors"]])
            known = PredictionHistory(anchors, deque())
            unfused = models.bands is None and models.backend is None
            latent = here.latent.float() if unfused else here.latent
            state = latent if process is None else process.state(latent, given["level"])
            prediction = path.predict(known, state, given["level"], multiple, here.geometry, models)
            return prediction, *companions[-1:]

        given = {
            "inputs": self._tensors_of(inputs),
            "level": call.level,
            "training levels": None if call.process is None else call.process.levels,
            "anchors": [_tensors_of_anchor(anchor, multiple) for anchor in anchors],
        }
        modules = self._modules(call, inputs, multiple)
        function, tensors = call.modulated(multiple, run, given)
        label = ("coarse", multiple, fused)
        prediction, *companions = self._through_cache(call, done, multiple, label, modules, function, tensors)
        if not done.blocks_skipped:
            flops += self._flops(call, inputs, multiple)
        return self._result(call, call.inputs, prediction, next(iter(companions), None), flops, done)

    def skipped(self, call: TransformerCall, history: PredictionHistory, multiple: int) -> StepResult:
        """A step without a model call: by the path if it makes none at ``multiple``, else by a line."""
        inputs = call.inputs
        assert inputs is not None

        def foretold(known: PredictionHistory) -> torch.Tensor:
            if multiple == SKIP:
                return known.forecast(call.sigma)
            models, state = Models(_no_model, _no_model), self._state(call, inputs)
            return self.path.predict(known, state, call.sigma, multiple, inputs.geometry, models)

        companion = None if history.companion is None else foretold(history.companion)
        result = self._result(call, inputs, foretold(history), companion, 0.0, _Execution())
        return replace(result, ran_model=False)

    def answer(self, call: TransformerCall, prediction: torch.Tensor) -> Any:
        """What the pipeline gets of a prediction of a coarse or skipped step, float32 (B, C, F, H, W)."""
        inputs = call.inputs
        assert inputs is not None
        if call.process is not None:
            prediction = call.process.prediction(prediction, self._state(call, inputs), call.sigma)
        return self._family.wrap(call.base, inputs, prediction.to(inputs.latent.dtype))

    def _result(
        self,
        call: TransformerCall,
        inputs: ModelInputs,
        prediction: torch.Tensor,
        companion: torch.Tensor | None,
        flops: float,
        done: _Execution,
    ) -> StepResult:
        output = self.answer(call, prediction)
        if companion is not None:
            output = self._family.accompanied(output, companion.to(inputs.latent.dtype))
        full = self._flops(call, inputs, 1)
        return StepResult(
            output,
            prediction,
            flops,
            full,
            done.replayed,
            done.blocks_skipped,
            companion=companion,
            fused=done.fused,
        )

    def _watched(self, at: Forwards, companions: list[torch.Tensor]) -> Forwards:
        """The same forwards; what their results hold of a companion goes into ``companions``."""
        if not self._family.companion_scheduler:
            return at

        def watched(multiple: int) -> Callable[..., Any]:
            inner = at(multiple)

            def forward(*args: Any, **kwargs: Any) -> Any:
                raw = inner(*args, **kwargs)
                found = self._family.companion(raw)
                companions.extend([] if found is None else [found])
                return raw

            return forward

        return watched

    def _probe(self, anchor: Anchor, multiple: int, done: _Execution) -> torch.Tensor:
        """What the coarse model misses at an earlier full step."""
        assert isinstance(anchor.models, CallModels)
        call = anchor.models.call
        assert call.inputs is not None
        inputs = self._placed(call.trimmed(self._family), multiple)
        forwards, fused = _forwards(call, probe=True), self._is_fused(call, multiple)

        def run(given: dict[str, Any]) -> torch.Tensor:
            here = replace(inputs, **given["inputs"])
            models = self._models(call, here, _process(call, given), forwards, fused)
            return self.path.missed(_anchor(given["anchor"], multiple, models), multiple, inputs.geometry)

        given = {
            "inputs": self._tensors_of(inputs),
            "training levels": None if call.process is None else call.process.levels,
            "anchor": _tensors_of_anchor(anchor, multiple),
        }
        function, tensors = call.modulated(multiple, run, given)
        modules = self._modules(call, inputs, multiple)
        return self._execute(call, done, ("probe", multiple, fused), modules, function, tensors)

    def _through_cache(
        self,
        call: TransformerCall,
        done: _Execution,
        multiple: int,
        label: Hashable,
        modules: Sequence[nn.Module],
        run: Callable[[Forwards, Any], Any],
        given: Any,
    ) -> Any:
        """The result of ``run``, behind TeaCache if there is one; each of its parts is executed the same way."""
        forwards = _forwards(call, probe=False)
        if call.cache is None:
            return self._execute(call, done, label, modules, lambda inputs: run(forwards, inputs), given)
        teacache, state = call.cache(multiple)

        def around(inner: Callable[..., Any], inputs: Any) -> Any:
            return run(lambda _: inner, inputs)

        def execute(part: str, function: Callable[[Any], Any], inputs: Any) -> Any:
            return self._execute(call, done, (label, part), modules, function, inputs)

        result, done.blocks_skipped = teacache.call(
            state, call.step, call.steps, forwards(multiple), around, given, execute
        )
        return result

    def _execute(
        self,
        call: TransformerCall,
        done: _Execution,
        label: Hashable,
        modules: Sequence[nn.Module],
        function: Callable[[Any], Any],
        given: Any,
    ) -> Any:
        if self.graphs is None:
            done.replayed = False
            return function(given)
        with self._family.capturable(call.base):
            result, replayed = self.graphs.run(modules, label, function, given, call.obstacle)
        done.replayed &= replayed
        return result

    def _modules(self, call: TransformerCall, inputs: ModelInputs, multiple: int) -> tuple[nn.Module, ...]:
        """The modules whose weights a coarse run reads, made and looked at before anything is captured."""
        if self.path.adapter is not None:
            return call.base, self.path.adapter
        if not self.path.needs_projections:
            return (call.base,)
        embedding = self._weights.embedding(call.base, multiple, inputs)
        if self.graphs is not None:
            self.graphs.refresh(embedding)
        return call.base, embedding

    def _placed(self, inputs: ModelInputs, multiple: int) -> ModelInputs:
        """A call's inputs with the positions of coarse tokens."""
        return replace(inputs, places=self._family.places(inputs, multiple, self._native))

    def _is_fused(self, call: TransformerCall, multiple: int) -> bool:
        """Whether kernels stand in for the transformer's ends in a coarse run."""
        projections = self.path.needs_projections
        wanted = projections or self.path.takes_kernels
        return wanted and self._fusing.is_possible(call, multiple, own=not projections)

    def _models(
        self,
        call: TransformerCall,
        inputs: ModelInputs,
        process: VariancePreserving | None,
        at: Forwards,
        fused: bool,
    ) -> Models:
        """How a path runs the model on a low state, and on coarse tokens, by the forwards of ``at``."""
        family, base, native = self._family, call.base, self._native

        def low(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            return family.run_low(base, at(multiple), inputs, latent, level, multiple, native).float()

        def tokens(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            embedding = self._weights.embedding(base, multiple, inputs)
            ends: PatchEnds = FusedEnds(embedding, self._fusing.backend) if fused else embedding
            with self._weights.lora(base, multiple):
                forward = at(multiple)
                found = family.run_patches(base, forward, inputs, latent, level, ends, multiple, native)
            return found if fused and self.path.takes_kernels and process is None else found.float()

        own = Models(low, tokens)
        if fused and self.path.takes_kernels:
            if self.path.needs_projections:
                own = replace(own, backend=self._fusing.backend)
            else:
                own = replace(own, bands=self._fusing.bands(base, inputs, at, native))
        return own if process is None else process.models(own, inputs.geometry.channels)

    def _flops(self, call: TransformerCall, inputs: ModelInputs, multiple: int) -> float:
        """FLOP of one model run."""
        beside = self._family.tokens_beside(inputs, multiple, self._native)
        key = (id(call.base), inputs.geometry, multiple, beside)
        if key not in self._costs:
            flops = self._family.flops(call.base, inputs.geometry, multiple, beside)
            self._costs[key] = flops + self._weights.flops(multiple, inputs.geometry.tokens(multiple), beside)
        return inputs.latent.shape[0] * self._costs[key]

    def _state(self, call: TransformerCall, inputs: ModelInputs) -> torch.Tensor:
        """The call's latent as a flow state; a flow's own stays in its dtype."""
        if call.process is None:
            return inputs.latent
        return call.process.state(inputs.latent.float(), call.sigma)

    def _tensors_of(self, inputs: ModelInputs) -> dict[str, Any]:
        """A call's inputs without the tokens that the latent was read from."""
        taken = self._family.latent_argument
        arguments = {name: value for name, value in inputs.arguments.items() if name != taken}
        extra = {"condition": inputs.condition, "references": inputs.references, "places": inputs.places}
        return {"arguments": arguments, "latent": inputs.latent, **extra}


def _forwards(call: TransformerCall, probe: bool) -> Forwards:
    """Multiple -> the transformer's forward as the call reaches it."""
    in_context = call.in_context
    return lambda multiple: call.inner if in_context is None else in_context(multiple, probe)


def _process(call: TransformerCall, given: dict[str, Any]) -> VariancePreserving | None:
    """The call's process, which reads the levels that are given to a graph."""
    return None if call.process is None else replace(call.process, levels=given["training levels"])


def _tensors_of_anchor(anchor: Anchor, multiple: int) -> tuple[Any, ...]:
    assert isinstance(anchor.models, CallModels)
    return anchor.models.call.level, anchor.latent, anchor.prediction, anchor.residuals.get(multiple)


def _anchor(tensors: tuple[Any, ...], multiple: int, models: Models) -> Anchor:
    level, latent, prediction, residual = tensors
    return Anchor(level, latent, prediction, models, {} if residual is None else {multiple: residual})


def _no_model(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
    raise AssertionError("a path that makes no model call made one")
