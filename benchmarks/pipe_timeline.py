"""When a pipeline's model runs begin and end, told by the device itself.

Stamps are CUDA events in the stream (on a CPU, the clock): recording one costs a microsecond or two and waits for
nothing, so that the gaps they show are those of an unobserved run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch


class Timeline:
    """Stamps of one call of a pipeline.

    Args:
        device: Where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._recording = False
        self._runs: list[tuple[Any, Any]] = []
        self._steps: list[tuple[int, Any]] = []  # model runs so far, stamp

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the context a call is recorded, in place of the one before; read it when its work is done."""
        self._runs, self._steps, self._recording = [], [], True
        try:
            yield
        finally:
            self._recording = False

    def _stamp(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._cuda else end - begin

    def on_model_run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls are model runs."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            # an event in a graph that is being captured would become part of it
            if not self._recording or (self._cuda and torch.cuda.is_current_stream_capturing()):
                return function(*args, **kwargs)
            begin = self._stamp()
            result = function(*args, **kwargs)
            self._runs.append((begin, self._stamp()))
            return result

        return run

    def on_step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """For ``callback_on_step_end``."""
        if self._recording:
            self._steps.append((len(self._runs), self._stamp()))
        return {}

    def steps(self) -> list[float]:
        """Seconds of every step but the first: from the end of the one before to its own."""
        return [self._between(a, b) for (_, a), (_, b) in pairwise(self._steps)]

    def model_runs(self) -> list[float]:
        """Seconds that every step but the first spent in model runs."""
        counts = [count for count, _ in self._steps]
        return [sum(self._between(*run) for run in self._runs[a:b]) for a, b in pairwise(counts)]

    def gaps(self) -> list[float]:
        """Seconds from the end of a step's last model run to the beginning of the next step's first, where both have
        one."""
        counts = [0, *(count for count, _ in self._steps)]
        steps = zip(counts, counts[1:], counts[2:], strict=False)
        return [self._between(self._runs[b - 1][1], self._runs[b][0]) for a, b, c in steps if a < b < c]


@contextmanager
def watched(transformer: type[torch.nn.Module], timeline: Timeline) -> Iterator[None]:
    """Within the context ``timeline`` sees the model runs of pipelines, eager ones and replays of graphs.

    Enter it before a pipeline is accelerated. The classes are patched, since a graph could not be captured of a
    transformer whose instance carries a foreign forward.
    """
    with ExitStack() as stack:
        for owner, name in ((transformer, "forward"), (torch.cuda.CUDAGraph, "replay")):
            stack.enter_context(patch.object(owner, name, timeline.on_model_run(getattr(owner, name))))
        yield
