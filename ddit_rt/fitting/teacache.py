"""Fits TeaCache to a model it has no published coefficients for, so that it is compared at its best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import unwrap_module

from ..errors import ConfigError
from ..families import denoisers, family_of
from ..pipeline import restore
from ..runtime import MethodPatch, installed, polynomial, relative_change
from ..schedule import check_speedup


@dataclass
class TeaCacheFit:
    """A fit and the runs it was made from.

    Attributes:
        coefficients: Highest order first; goes into :class:`ddit_rt.TeaCacheConfig`.
        runs: Per stream of model calls, (change of the signal, change of the output) from step to step.
    """

    coefficients: tuple[float, ...]
    runs: list[list[tuple[float, float]]]

    def share_computed(self, threshold: float) -> float:
        """The share of steps whose blocks the rule would run on the recorded streams."""
        computed = total = 0
        for run in self.runs:
            accumulated = 0.0
            computed += 2  # first and last
            total += len(run) + 1
            for change, _ in run[:-1]:
                accumulated += polynomial(self.coefficients, change)
                if accumulated >= threshold:
                    computed, accumulated = computed + 1, 0.0
        return computed / total

    def threshold_for(self, speedup: float) -> float:
        """The threshold at which the rule runs the blocks at 1 / ``speedup`` of the steps, or as near as it comes.

        Raises:
            ConfigError: ``speedup`` is not above 1.
        """
        check_speedup(speedup)
        low, high = 1e-6, 1e3
        for _ in range(50):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.share_computed(middle) > 1 / speedup else (low, middle)
        return high


def fit_teacache(
    pipe: Any, prompts: Sequence[str], seed: int = 0, retention: bool = False, degree: int = 4, **call: Any
) -> TeaCacheFit:
    """Runs the plain pipeline and fits the change of the transformer's output to the change of the signal.

    This is how TeaCache's authors found their coefficients (arXiv 2411.19108, section 3.3).

    Args:
        pipe: A supported pipeline; left plain.
        prompts: One run each.
        seed: Of the first prompt's noise; the i-th takes seed + i.
        retention: Watch the signal of the retention variant.
        degree: Of the polynomial.
        **call: Arguments of the pipeline.
    """
    restore(pipe)
    runs = [
        stream
        for index, prompt in enumerate(prompts)
        for stream in _record(pipe, retention, {**call, "prompt": prompt}, seed + index)
    ]
    points = np.array([point for run in runs for point in run])
    if len(points) <= degree:
        raise ConfigError(f"{len(points)} changes cannot carry a polynomial of degree {degree}: run more steps.")
    return TeaCacheFit(tuple(float(c) for c in np.polyfit(points[:, 0], points[:, 1], degree)), runs)


def _record(pipe: Any, retention: bool, call: dict[str, Any], seed: int) -> list[list[tuple[float, float]]]:
    """Per model call of a step (guidance makes two), the changes from step to step."""
    family = family_of(pipe)
    before: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    ordinal = 0

    def watch(module: torch.nn.Module) -> Any:
        trunk = family.trunk(unwrap_module(module))

        def handle(inner: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal ordinal
            result = inner(*args, **kwargs)
            output = result[0] if isinstance(result, tuple) else result.sample
            signal = trunk.signal(family.bind(args, kwargs), retention)
            key = (id(module), ordinal)
            if key in before:
                changes = [relative_change(*pair)[0] for pair in zip((signal, output), before[key])]
                found.setdefault(key, []).append((changes[0], changes[1]))
            before[key] = (signal, output)
            ordinal += 1
            return result

        return handle

    def next_step(inner: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal ordinal
        ordinal = 0
        return inner(*args, **kwargs)

    patches = [MethodPatch(module, "forward", watch(module)) for module in denoisers(pipe, family).values()]
    patches.append(MethodPatch(pipe.scheduler, "step", next_step))
    with installed(patches):
        pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="latent")
    return list(found.values())
