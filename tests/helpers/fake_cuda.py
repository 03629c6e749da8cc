"""A CUDA runtime of several devices that only keeps books, in place of ``torch.cuda``: what is current, captured, open.

Its rules are those of PyTorch's C++ (CUDAGraph.cpp, CUDAGeneratorImpl.cpp, CUDACachingAllocator.cpp), as far as the
package depends on them. Nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stream:
    def __init__(self, cuda: FakeCuda, device: int, name: str = "") -> None:
        self._cuda, self.device_index, self.name = cuda, device, name
        self.device = torch.device("cuda", device)
        self.capturing: Graph | None = None

    def wait_stream(self, other: Stream) -> None:
        self._cuda.log.append(("wait", self, other))

    def wait_event(self, event: Event) -> None:
        self._cuda.log.append(("wait", self, event))


class Event:
    def __init__(self, cuda: FakeCuda, **_: Any) -> None:
        self._cuda, self.stream = cuda, None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self._cuda.current_stream()
        self._cuda.log.append(("record", self.stream, self))

    def synchronize(self) -> None:
        self._cuda.log.append(("synchronize", self.stream, self))

    def elapsed_time(self, other: Event) -> float:
        assert self.stream.device == other.stream.device
        return 1.0


class GeneratorState:
    def __init__(self) -> None:
        self.capturing = False


class Generator:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self.state = cuda, GeneratorState()

    def clone_state(self) -> Generator:
        assert not self._cuda.is_current_stream_capturing()
        return Generator(self._cuda)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def draw(self) -> None:
        if bool(self._cuda.current_stream().capturing) != self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self._ended, self.broken, self._pool = cuda, False, False, None

    def capture_begin(self, pool: Any) -> None:
        cuda, stream = self._cuda, self._cuda.current_stream()
        self._pool, self._stream, self._generator = pool, stream, cuda.generators[cuda.current_device()].state
        self._generator.capturing = True
        cuda.open.append(pool)
        cuda.users[pool] += 1
        stream.capturing = self

    def capture_end(self) -> None:
        if self._cuda.current_stream() is not self._stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self._stream.capturing = None
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._cuda.end(0, self._pool)
        self._generator.capturing = False
        self._ended = True

    def pool(self) -> Any:
        if not self._ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def replay(self) -> None:
        self._cuda.log.append(("replay", self._cuda.current_stream(), self))


class FakeCuda:
    """Install it with pytest's monkeypatch.

    Attributes:
        log: What was asked for: (what, stream, of what).
        open: Pools that allocations are directed to.
        users: Pool -> how many hold it.
    """

    def __init__(self, monkeypatch: Any, devices: int = 2) -> None:
        self.log: list[tuple[str, Stream, Any]] = []
        self.open: list[Any] = []
        self.users: Counter[Any] = Counter()
        self.generators = [Generator(self) for _ in range(devices)]
        self._device = 0
        self._default = [Stream(self, index, "default") for index in range(devices)]
        self._current = list(self._default)
        self._handles = 0
        for name in (
            "current_device", "current_stream", "default_stream", "device", "graph", "graph_pool_handle",
            "is_current_stream_capturing", "set_stream", "stream",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self, self._index(device), "side"))
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(self, **options))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "default_generators", self.generators)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def _index(self, device: Any) -> int:
        index = device.index if isinstance(device, torch.device) else device
        return self._device if index is None else index

    def current_device(self) -> int:
        return self._device

    def current_stream(self, device: Any = None) -> Stream:
        return self._current[self._index(device)]

    def default_stream(self, device: Any = None) -> Stream:
        return self._default[self._index(device)]

    def set_stream(self, stream: Stream) -> None:
        self._device = stream.device_index
        self._current[stream.device_index] = stream

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._device = self._device, self._index(device)
        try:
            yield
        finally:
            self._device = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        device, before = self._device, self._current[stream.device_index]
        self.set_stream(stream)
        try:
            yield
        finally:
            self._current[stream.device_index], self._device = before, device

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream().capturing is not None

    def graph_pool_handle(self) -> Any:
        self._handles += 1
        return (0, self._handles)

    @contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        # as PyTorch has it: where the capture does not end, the stream stays current
        self.set_stream(stream)
        graph.capture_begin(pool)
        try:
            yield
        finally:
            graph.capture_end()
            self.set_stream(self._default[stream.device_index])

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        self.users[pool] -= 1
        assert self.users[pool] >= 0

    def breaks_the_capture(self) -> None:
        """What CUDA does not capture."""
        graph = self.current_stream().capturing
        if graph is not None:
            graph.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
