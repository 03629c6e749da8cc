"""TeaCache: skips the transformer's blocks while its modulated input hardly changes, per patch size and per model call.

The rule and its coefficients are those of Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion
Model" (arXiv 2411.19108) and of its code for FLUX and Wan 2.1. The relative change of a signal that is known before
the blocks run is mapped by a polynomial to the change to expect of their output; while the sum stays below the
threshold, the blocks' last residual is added instead of running them.

Two rules are added. A patch size that sat out a step runs its blocks, so no residual is older than one switch. And
every sample of a batch keeps its own sum, the blocks running when any sample needs them: a batch skips no more than
its most demanding sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..cache_config import TeaCacheConfig
from ..errors import ConfigError

RETAINED_STEPS = 5

Forward = Callable[..., Any]
Around = Callable[[Forward, Any], Any]
Bind = Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Any]]
Execute = Callable[[str, Callable[[Any], Any], Any], Any]


@dataclass(frozen=True)
class TeaCacheDefaults:
    """What is published of TeaCache for a model.

    Attributes:
        model: Name, for messages.
        threshold: For which about twice the speed is published.
        coefficients: Of the polynomial, highest order first.
        retention: Those of the variant that computes the first steps and watches another signal; None if there is none.
    """

    model: str
    threshold: float
    coefficients: tuple[float, ...]
    retention: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Trunk:
    """Where a transformer keeps what TeaCache steps around.

    Attributes:
        published: Threshold and coefficients for the model.
        embedder: Child whose output enters the blocks.
        blocks: Children that hold the blocks, lists of modules.
        norm: Child that takes the blocks' output as its first argument.
        tokens: Brings the embedder's output to the layout the blocks see, (B, N, d).
        signal: (arguments of the forward, retention variant?) -> (B, ...), what the rule watches.
    """

    published: TeaCacheDefaults
    embedder: nn.Module
    blocks: tuple[str, ...]
    norm: nn.Module
    tokens: Callable[[torch.Tensor], torch.Tensor]
    signal: Callable[[Mapping[str, Any], bool], torch.Tensor]


@dataclass
class CacheState:
    """What one stream of model calls (the conditional one at 2p, say) remembers within one pipeline call."""

    step: int = -1
    signal: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    accumulated: list[float] = field(default_factory=list)


class TeaCache:
    """The rule for one transformer. It keeps no state: :class:`CacheState` does, and lives as long as a pipeline call.

    Args:
        config: Threshold and coefficients; what is None follows the model.
        trunk: The transformer's parts.
        module: The transformer.
        bind: (positional, keyword arguments of its forward) -> all of them by name.

    Raises:
        ConfigError: the retention variant of a model that has none.
    """

    def __init__(self, config: TeaCacheConfig, trunk: Trunk, module: nn.Module, bind: Bind) -> None:
        self.trunk = trunk
        self.module = module
        self._bind = bind
        self.retention = config.retention
        published = trunk.published.retention if config.retention else trunk.published.coefficients
        coefficients = published if config.coefficients is None else config.coefficients
        if coefficients is None:
            raise ConfigError(
                f"no coefficients are published for {trunk.published.model}-retention: leave retention=False or give "
                "coefficients."
            )
        self.coefficients = coefficients
        self.threshold = config.threshold if config.threshold is not None else trunk.published.threshold

    def call(
        self, state: CacheState, step: int, steps: int, forward: Forward, around: Around, inputs: Any, execute: Execute
    ) -> tuple[Any, bool]:
        """Computes what lies around the transformer, with all of it inside or its ends alone.

        The decision is the host's and falls between parts that are functions of tensors: the signal, the whole,
        and the whole without blocks. Each of them can be a captured graph.

        Args:
            state: Of this stream and patch size.
            step: Denoising step, from 0.
            steps: How many there are.
            forward: The transformer's forward.
            around: (forward, inputs) -> result; calls the forward once.
            inputs: Of ``around``.
            execute: Runs a part, given its name, function and tensors; directly, or through a graph runner.

        Returns:
            The result of ``around``, and whether the blocks were skipped.
        """

        def signal() -> torch.Tensor:
            return execute("signal", lambda given: self._signal(around, given), inputs)

        def run() -> Any:
            result, state.residual = execute("run", lambda given: self._run(forward, around, given), inputs)
            return result

        known = state.residual is not None and state.step == step - 1
        state.step = step
        if not known:
            # signal after the run: before the first one, an offloaded model has no weights on the device yet
            result = run()
            state.signal = signal()
            state.accumulated = [0.0] * state.signal.shape[0]
            return result, False
        now, before = signal(), state.signal
        assert before is not None
        forced = self.must_compute(step, steps)
        skip = not forced and self.accumulate(state, relative_change(now, before))
        state.signal = now
        if skip:
            given = {"inputs": inputs, "residual": state.residual}
            return execute("skip", lambda t: self._skip(forward, around, t["inputs"], t["residual"]), given), True
        state.accumulated = [0.0] * len(state.accumulated)
        return run(), False

    def must_compute(self, step: int, steps: int) -> bool:
        """The published exceptions: the first and last step, or the first five in the retention variant."""
        return step < RETAINED_STEPS if self.retention else step in (0, steps - 1)

    def accumulate(self, state: CacheState, changes: Sequence[float]) -> bool:
        """Adds the expected change of every sample; True while all stay below the threshold, which NaN does not."""
        state.accumulated = [
            total + polynomial(self.coefficients, change) for total, change in zip(state.accumulated, changes)
        ]
        return all(total < self.threshold for total in state.accumulated)

    def _signal(self, around: Around, inputs: Any) -> torch.Tensor:
        """What the rule watches, from the part before the transformer's forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _Arrived(self.trunk.signal(self._bind(args, kwargs), self.retention))

        try:
            around(forward, inputs)
        except _Arrived as arrived:
            return arrived.signal
        raise AssertionError("the transformer was not called")

    def _run(self, forward: Forward, around: Around, inputs: Any) -> tuple[Any, torch.Tensor]:
        entering: list[torch.Tensor] = []
        leaving: list[torch.Tensor] = []
        hooks = (
            self.trunk.embedder.register_forward_hook(lambda _, __, output: entering.append(output)),
            self.trunk.norm.register_forward_pre_hook(lambda _, inputs: leaving.append(inputs[0])),
        )
        with _removing(hooks):
            result = around(forward, inputs)
        embedded = self.trunk.tokens(entering[0])
        return result, leaving[0].to(embedded.dtype) - embedded

    def _skip(self, forward: Forward, around: Around, inputs: Any, residual: torch.Tensor) -> Any:
        hook = self.trunk.norm.register_forward_pre_hook(
            lambda _, inputs: (inputs[0] + residual.to(inputs[0].dtype), *inputs[1:])
        )
        with _removing((hook,)), _without(self.module, self.trunk.blocks):
            return around(forward, inputs)


class _Arrived(Exception):
    """Carries the signal out of what lies around the transformer."""

    def __init__(self, signal: torch.Tensor) -> None:
        self.signal = signal


def relative_change(signal: torch.Tensor, before: torch.Tensor) -> list[float]:
    """mean|m - m'| / mean|m'| of every sample of two (B, ...) tensors; waits for the device."""
    now, then = signal.flatten(1).float(), before.flatten(1).float()
    return ((now - then).abs().mean(1) / then.abs().mean(1)).tolist()


def polynomial(coefficients: Sequence[float], value: float) -> float:
    """Horner's rule, highest order first."""
    result = 0.0
    for coefficient in coefficients:
        result = result * value + coefficient
    return result


@contextmanager
def _removing(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context the named lists of blocks are empty."""
    kept = {name: module._modules[name] for name in names}
    try:
        for name in names:
            module._modules[name] = nn.ModuleList()
        yield
    finally:
        module._modules.update(kept)
