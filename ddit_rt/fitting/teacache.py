"""Fits TeaCache to a model it has no published coefficients for, so that it is compared at its best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..families import family_of
from ..runtime import polynomial, relative_change
from ..schedule import check_speedup
from ..trajectories import Prompt, Recorder, StreamCall, call_with, denoise

Change = tuple[float, float]
"""Of the signal, and of the transformer's prediction, from one step to the next; relative, of the first sample."""


@dataclass
class TeaCacheFit:
    """A fit and what it was made from.

    Attributes:
        coefficients: Highest order first; goes into :class:`ddit_rt.TeaCacheConfig`.
        streams: Per stream of every run, the changes from step to step.
    """

    coefficients: tuple[float, ...]
    streams: list[list[Change]]

    def share_computed(self, threshold: float) -> float:
        """The share of steps whose blocks the rule would run on the recorded streams."""
        computed = total = 0
        for stream in self.streams:
            accumulated = 0.0
            computed += 2  # first and last
            total += len(stream) + 1
            for change, _ in stream[:-1]:
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
    pipe: Any, prompts: Sequence[Prompt], seed: int = 0, retention: bool = False, degree: int = 4, **call: Any
) -> TeaCacheFit:
    """Runs the plain pipeline and fits the change of the transformer's output to the change of the signal.

    This is how TeaCache's authors found their coefficients (arXiv 2411.19108, section 3.3).

    Args:
        pipe: A supported pipeline; left plain.
        prompts: One run each; as for :func:`ddit_rt.fit`.
        seed: Of the first prompt's noise; the i-th takes seed + i.
        retention: Watch the signal of the retention variant.
        degree: Of the polynomial.
        **call: Arguments of the pipeline.

    Raises:
        UnsupportedPipelineError: no family knows the pipeline.
        ConfigError: the runs have too few steps for a polynomial of this degree.
    """
    streams = [
        stream
        for index, prompt in enumerate(prompts)
        for stream in _changes(pipe, retention, call_with(prompt, call), seed + index)
    ]
    points = np.array([point for stream in streams for point in stream])
    if len(points) <= degree:
        raise ConfigError(f"{len(points)} changes cannot carry a polynomial of degree {degree}: run more steps.")
    return TeaCacheFit(tuple(float(c) for c in np.polyfit(points[:, 0], points[:, 1], degree)), streams)


def _changes(pipe: Any, retention: bool, call: dict[str, Any], seed: int) -> list[list[Change]]:
    """Changes from step to step along one plain run, of each stream of each transformer."""
    family = family_of(pipe)
    before: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    found: dict[tuple[int, int], list[Change]] = {}

    def keep_call(call: StreamCall) -> None:
        stream = call.transformer, call.stream
        signal = family.trunk(call.module).signal(call.arguments, retention)
        if stream in before:
            old_signal, old_prediction = before[stream]
            change = relative_change(signal, old_signal)[0], relative_change(call.prediction, old_prediction)[0]
            found.setdefault(stream, []).append(change)
        before[stream] = signal, call.prediction

    # TeaCache caches calls that coarse tokens could not carry too
    recorder = Recorder(pipe, family, parse=False)
    recorder.record(lambda: denoise(pipe, seed, call), keep_call, lambda step: None)
    return list(found.values())
