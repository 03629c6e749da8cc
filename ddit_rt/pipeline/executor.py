"""One run of the transformer at one multiple, from latent to prediction, as a function of nothing but tensors.

That is what a captured graph can hold: embedding, trunk and de-embedding, with all that a coarse path does around them.
Whatever changes from step to step enters as a tensor, the noise level too; eager execution takes the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..families import Call, Family
from ..granularity import Adapter, Anchor, CoarsePath, MergedSet, Models, PatchEmbedding, PredictionHistory, Scalar
from ..runtime import CacheState, GraphRunner, TeaCache
from .call_state import CallState

# multiple -> the transformer's forward, in the context of diffusers' cache if there is one
Forwards = Callable[[int], Callable[..., Any]]
# multiple -> TeaCache and what it remembers
Cached = Callable[[int], tuple[TeaCache, CacheState]]


@dataclass(frozen=True)
class TransformerCall:
    """One call of the transformer by the pipeline.

    Attributes:
        run: The pipeline call it belongs to.
        base: The transformer, without a compiler's wrapping.
        arguments: Of the call, by name.
        call: What the family read in them; None if it cannot run coarsely.
        at: How to reach the transformer.
        obstacle: Why its runs cannot be captured, if the caller knows a reason.
        cache: TeaCache, or None. Probes pass it by.
    """

    run: CallState
    base: nn.Module
    arguments: dict[str, Any]
    call: Call | None
    at: Forwards
    obstacle: str
    cache: Cached | None = None


@dataclass(frozen=True)
class _BoundModels(Models):
    """Remembers the visit, so that a probe at a later step can still run the model as this step did."""

    visit: TransformerCall
    level: torch.Tensor


class StepExecutor:
    """Runs rows, through graphs if there is a runner for them.

    Args:
        family: Of the transformer.
        path: What a coarse step computes.
        native: See ``DDiTConfig.positions``.
        adapter: Of the path, or None.
        graphs: Runner, or None to run eagerly.
        merged: Multiples whose LoRA is merged into copies of the weights.
    """

    def __init__(
        self,
        family: Family,
        path: CoarsePath,
        native: bool,
        adapter: Adapter | None,
        graphs: GraphRunner | None,
        merged: Sequence[int] = (),
    ) -> None:
        self.graphs = graphs
        self._family = family
        self._path = path
        self._native = native
        self._adapter = adapter
        self._merged_sizes = tuple(merged)
        self._merged: dict[tuple[int, int], MergedSet] = {}
        self._embeddings: dict[tuple[int, int], tuple[tuple[tuple[int, int], ...], PatchEmbedding]] = {}

    def refresh(self, base: nn.Module, call: Call | None, run: CallState) -> None:
        """Notices changed weights and switches; for the time before the decision, when the host only waits."""
        if self._adapter is not None and call is not None:
            self._adapter.place(call.latent.device, call.latent.dtype)
            adapter = self._adapter
            for merged in dict.fromkeys(self._merged_set(base, adapter, k) for k in self._merged_sizes):
                merged.refresh(always=id(base) not in run.renewed)
            run.renewed.add(id(base))
        if self.graphs is not None:
            self.graphs.refresh(base, *(() if self._adapter is None else (self._adapter,)))

    def full(self, visit: TransformerCall) -> Any:
        """The transformer's own result at multiple 1."""

        def row(at: Forwards, arguments: dict[str, Any]) -> Any:
            return at(1)(**arguments)

        raw = self._through_cache(visit, 1, "full", (visit.base,), row, visit.arguments)
        if visit.call is not None:
            self._count(visit, visit.call, 1)
        return raw

    def anchor(self, visit: TransformerCall, raw: Any) -> Anchor:
        """What later coarse steps need of a full one, from its raw result."""
        call = visit.call
        assert call is not None
        bound = _BoundModels(*self._models(visit, call, visit.at), visit, visit.run.level(call.latent.device))
        return Anchor(visit.run.sigma, call.latent, self._family.output(visit.base, call, raw), bound)

    def coarse(self, visit: TransformerCall, trajectory: PredictionHistory, multiple: int) -> torch.Tensor:
        """The prediction of a coarse step, float32 (B, C, F, H, W)."""
        call = visit.call
        assert call is not None
        anchors = list(trajectory.anchors)[-self._path.anchors :] if self._path.anchors else []
        for anchor in reversed(anchors[-self._path.probes :] if self._path.probes else []):
            if multiple not in anchor.residuals:
                anchor.residuals[multiple] = self._probe(anchor, multiple)

        def row(at: Forwards, inputs: dict[str, Any]) -> torch.Tensor:
            here = _with_tensors(call, inputs["call"])
            models = Models(*self._models(visit, here, at))
            known = PredictionHistory(deque(_anchor(tensors, multiple, models) for tensors in inputs["anchors"]))
            return self._path.predict(known, here.latent.float(), inputs["level"], multiple, here.geometry, models)

        inputs = {
            "call": _tensors_of(call),
            "level": visit.run.level(call.latent.device),
            "anchors": [_tensors_of_anchor(anchor, multiple) for anchor in anchors],
        }
        modules = self._modules(visit, call, multiple)
        prediction = self._through_cache(visit, multiple, ("coarse", multiple), modules, row, inputs)
        self._count(visit, call, multiple)
        return prediction

    def _probe(self, anchor: Anchor, multiple: int) -> torch.Tensor:
        """What the coarse model misses at an earlier full step."""
        assert isinstance(anchor.models, _BoundModels)
        visit = anchor.models.visit
        call = visit.call
        assert call is not None
        visit.run.skipped = False

        def row(inputs: dict[str, Any]) -> torch.Tensor:
            models = Models(*self._models(visit, _with_tensors(call, inputs["call"]), visit.at))
            return self._path.missed(_anchor(inputs["anchor"], multiple, models), multiple, call.geometry)

        inputs = {"call": _tensors_of(call), "anchor": _tensors_of_anchor(anchor, multiple)}
        residual = self._execute(visit, ("probe", multiple), self._modules(visit, call, multiple), row, inputs)
        self._count(visit, call, multiple)
        return residual

    def _through_cache(
        self,
        visit: TransformerCall,
        multiple: int,
        label: Hashable,
        modules: Sequence[nn.Module],
        row: Callable[[Forwards, Any], Any],
        inputs: dict[str, Any],
    ) -> Any:
        """The row's result, behind TeaCache if there is one; each of its parts runs as rows do."""
        run = visit.run
        run.skipped = False
        if visit.cache is None:
            return self._execute(visit, label, modules, lambda given: row(visit.at, given), inputs)
        teacache, state = visit.cache(multiple)

        def around(forward: Callable[..., Any], given: Any) -> Any:
            return row(lambda _: forward, given)

        def execute(part: str, function: Callable[[Any], Any], given: Any) -> Any:
            return self._execute(visit, (label, part), modules, function, given)

        forward = visit.at(multiple)
        result, run.skipped = teacache.call(state, run.index, run.steps, forward, around, inputs, execute)
        return result

    def _execute(
        self,
        visit: TransformerCall,
        label: Hashable,
        modules: Sequence[nn.Module],
        function: Callable[[Any], Any],
        inputs: dict[str, Any],
    ) -> Any:
        if self.graphs is None:
            result, replayed = function(inputs), False
        else:
            result, replayed = self.graphs.run(modules, label, function, inputs, visit.obstacle)
        visit.run.replayed &= replayed
        return result

    def _modules(self, visit: TransformerCall, call: Call, multiple: int) -> tuple[nn.Module, ...]:
        """The modules whose weights a coarse row reads, made and looked at before anything is captured."""
        if self._adapter is not None:
            return visit.base, self._adapter
        if not self._path.needs_embedding:
            return (visit.base,)
        embedding = self._embedding(visit.base, multiple, call.latent)
        if self.graphs is not None:
            self.graphs.refresh(embedding)
        return visit.base, embedding

    def _models(self, visit: TransformerCall, call: Call, at: Forwards) -> tuple[Any, Any]:
        """How a path runs the model on a low latent, and on coarse tokens, by the forwards of ``at``."""
        family, base, native = self._family, visit.base, self._native

        def low(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            arguments = family.low_arguments(call, latent, level, multiple, native)
            with family.positions(base, call, multiple, native):
                raw = at(multiple)(**arguments)
            return family.low_output(base, call, raw, multiple).float()

        def tokens(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            embedding = self._embedding(base, multiple, call.latent)
            with self._lora(base, multiple):
                forward = at(multiple)
                return family.run_patches(base, forward, call, latent, level, embedding, multiple, native).float()

        return low, tokens

    def _embedding(self, base: nn.Module, multiple: int, like: torch.Tensor) -> PatchEmbedding:
        if self._adapter is not None:
            return self._adapter.size(multiple).embedding
        # a fused LoRA or another dtype changes the weights that the embedding was resized from
        weights = (weight for name in self._family.end_names for weight in getattr(base, name).parameters())
        stamp = tuple((weight.data_ptr(), weight._version) for weight in weights)
        key = (id(base), multiple)
        if key not in self._embeddings or self._embeddings[key][0] != stamp:
            made = self._family.patch_embedding(base, multiple).requires_grad_(False)
            self._embeddings[key] = (stamp, made)
        return self._embeddings[key][1].to(like.device, like.dtype)

    def _lora(self, base: nn.Module, multiple: int) -> AbstractContextManager[None]:
        if self._adapter is None:
            return nullcontext()
        if multiple in self._merged_sizes:
            return self._merged_set(base, self._adapter, multiple).active()
        return self._adapter.lora(multiple).active(base)

    def _merged_set(self, base: nn.Module, adapter: Adapter, multiple: int) -> MergedSet:
        lora = adapter.lora(multiple)  # one for all multiples, if the adapter shares it
        key = (id(base), id(lora))
        if key not in self._merged:
            self._merged[key] = MergedSet(lora, base)
        return self._merged[key]

    def _count(self, visit: TransformerCall, call: Call, multiple: int) -> None:
        """Adds a model run to the step's FLOP.

        A run whose blocks TeaCache skipped counts as nothing: embedding and output are a thousandth of it.
        """
        batch = call.latent.shape[0]
        record = visit.run.record
        assert record is not None
        if multiple == 1:
            record.full_flops += self.full_flops(visit.base, call)
        if visit.run.skipped:
            record.executed = "cached" if not record.flops else record.executed
            return
        record.executed = "graph" if visit.run.replayed else "eager"
        flops = self._family.flops(visit.base, call.geometry, multiple, call.text_tokens)
        if self._adapter is not None and multiple > 1:
            merged = multiple in self._merged_sizes
            flops += self._adapter.flops(multiple, call.geometry.tokens(multiple), call.text_tokens, merged)
        record.flops += batch * flops

    def full_flops(self, base: nn.Module, call: Call) -> float:
        """FLOP of the call at multiple 1."""
        return call.latent.shape[0] * self._family.flops(base, call.geometry, 1, call.text_tokens)


def _tensors_of(call: Call) -> dict[str, Any]:
    """A call without the tokens that the latent was read from."""
    arguments = {name: value for name, value in call.arguments.items() if name != "hidden_states"}
    return {"arguments": arguments, "latent": call.latent, "condition": call.condition}


def _with_tensors(call: Call, tensors: dict[str, Any]) -> Call:
    return replace(call, **tensors)


def _tensors_of_anchor(anchor: Anchor, multiple: int) -> tuple[Any, ...]:
    assert isinstance(anchor.models, _BoundModels)
    return anchor.models.level, anchor.latent, anchor.prediction, anchor.residuals.get(multiple)


def _anchor(tensors: tuple[Any, ...], multiple: int, models: Models) -> Anchor:
    level, latent, prediction, residual = tensors
    return Anchor(level, latent, prediction, models, {} if residual is None else {multiple: residual})
