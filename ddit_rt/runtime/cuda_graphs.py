"""Captures functions with CUDA graphs, and leaves the device usable where that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from .graphs import Captured, GraphRunner


@dataclass
class _Place:
    """What the graphs of one device share."""

    stream: torch.cuda.Stream
    pool: Any
    live: int = 0
    last: torch.cuda.Stream | None = None
    # allocators may go on asking a graph whose capture failed, so it has to stay
    failed: list[torch.cuda.CUDAGraph] = field(default_factory=list)


class CudaGraphs:
    """Captures with ``torch.cuda.graph``: on a side stream, into one memory pool per device."""

    device_type = "cuda"
    warmups = 2  # the first run compiles and tunes, the second runs what was chosen

    def __init__(self) -> None:
        self._places: dict[torch.device, _Place] = {}
        self._owners: dict[int, _Place] = {}

    def capture(self, function: Callable[[], Any], device: torch.device) -> Captured:
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            place = self._places.get(device)
            if place is None:
                place = self._places[device] = _Place(torch.cuda.Stream(), None)
            place.stream.wait_stream(current)
            try:
                with torch.cuda.stream(place.stream):
                    for _ in range(self.warmups):
                        function()
                graph, outputs = self._captured(function, place)
            finally:
                torch.cuda.set_stream(current)  # a capture that failed does not always leave its stream
            current.wait_stream(place.stream)
            place.live += 1

            def replay() -> None:
                graph.replay()
                place.last = torch.cuda.current_stream(device)

            captured = Captured(replay, outputs)
            self._owners[id(captured)] = place
            return captured

    def _captured(self, function: Callable[[], Any], place: _Place) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of ``function`` and what the function returned, on the current device."""
        if not place.live:
            place.pool = torch.cuda.graph_pool_handle()  # a pool that lost its last graph cannot be used again
        graph, begun = torch.cuda.CUDAGraph(), False
        try:
            # thread_local: other threads may go on using the device, as servers do
            with torch.cuda.graph(graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"):
                begun = True
                outputs = function()
        except BaseException:
            if not _ended(graph):
                _abandon(graph, begun, place)
            raise
        return graph, outputs

    def follow(self, device: torch.device) -> None:
        place = self._places.get(device)
        if place is not None and place.last is not None:
            current = torch.cuda.current_stream(device)
            if current != place.last:
                current.wait_stream(place.last)

    def release(self, captured: Captured) -> None:
        # the graph itself goes with the last reference to the captured function
        self._owners.pop(id(captured)).live -= 1


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a graph's capture came to its end; the graph then cleans up after itself."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _abandon(graph: torch.cuda.CUDAGraph, begun: bool, place: _Place) -> None:
    """Does what a capture that failed has left undone; PyTorch gives up at the first error of CUDA's.

    It may leave a stream in capture; all allocations of that stream directed to the graph's pool, and the pool held for
    good; and the device's random generator in a state that every use outside a capture is refused in ("Offset increment
    outside graph capture encountered unexpectedly").

    Args:
        graph: It has no end.
        begun: The capture had begun for certain.
        place: Where it was.
    """
    device = torch.cuda.current_device()
    with torch.cuda.stream(place.stream):
        if torch.cuda.is_current_stream_capturing():
            _attempt(graph.capture_end)
    if _ended(graph):
        return
    place.failed.append(graph)
    opened = _attempt(torch._C._cuda_endAllocateToPool, device, place.pool)
    if opened or begun:
        _attempt(torch._C._cuda_releasePool, device, place.pool)
    with torch.cuda.stream(torch.cuda.default_stream()):
        generator = torch.cuda.default_generators[device]
        # the same numbers to come, but not in capture
        generator.graphsafe_set_state(generator.clone_state())


def _attempt(function: Callable[..., Any], *arguments: Any) -> bool:
    """Calls ``function``; whether it succeeded."""
    try:
        function(*arguments)
    except RuntimeError:
        return False
    return True


def make_runner(setting: bool | str, limit: int) -> GraphRunner | None:
    """The runner for ``DDiTConfig.cuda_graphs``; None where everything runs eagerly.

    Raises:
        ConfigError: graphs are demanded on a machine without a CUDA device.
    """
    available = torch.cuda.is_available()
    if setting is True and not available:
        raise ConfigError("cuda_graphs=True needs a CUDA device, and there is none here: use 'auto' or False.")
    return GraphRunner(CudaGraphs(), limit) if setting and available else None
