"""Runs functions of tensors from captured graphs: one graph per label and input signature, bounded, never stale.

The runner knows nothing of how a graph is captured: :mod:`ddit_rt.runtime.cuda_graphs` does it with CUDA, the tests
with a recorder that replays operations on the CPU under the same rules (fixed addresses, outputs overwritten by the
next replay).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .model_state import ModelState, ambient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A graph: ``replay()`` reads the static inputs and weights, and writes ``outputs``, always the same memory."""

    replay: Callable[[], None]
    outputs: Any


class CaptureBackend(Protocol):
    """How functions are captured."""

    device_type: str

    def capture(self, function: Callable[[], Any], device: torch.device) -> Captured:
        """Warms ``function`` up and captures it. Graphs may share memory for what they compute, outputs included."""
        ...

    def follow(self, device: torch.device) -> None:
        """Orders the work to come behind that of the last replay, which may have been issued on another stream."""
        ...

    def release(self, captured: Captured) -> None:
        """Gives the graph's memory back; it is not replayed any more."""
        ...


@dataclass(frozen=True)
class _Key:
    """What has to be the same for a graph to give the same result."""

    modules: tuple[int, ...]
    label: Hashable
    structure: pytree.TreeSpec
    values: tuple[Any, ...]
    tensors: tuple[Hashable, ...]
    switches: tuple[Hashable, ...]
    ambient: Hashable

    def __post_init__(self) -> None:
        # looked up several times a step while the device waits
        values = (self.modules, self.label, self.structure, self.values, self.tensors, self.switches, self.ambient)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]


# indices of inputs, and the static tensors that take them
_Groups = list[tuple[list[int], list[torch.Tensor]]]


@dataclass(frozen=True)
class _Entry:
    key: _Key
    captured: Captured | None  # None: capturing failed, do not try again
    groups: _Groups


class GraphRunner:
    """Calls functions through captured graphs where that gives the same result, eagerly where it might not.

    Args:
        capture: How to capture.
        limit: Most graphs to keep; the least recently used goes first.
    """

    def __init__(self, capture: CaptureBackend, limit: int) -> None:
        self._capture = capture
        self._limit = limit
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._watches: dict[int, ModelState] = {}
        self._versions: dict[int, int] = {}
        self._logged: set[str] = set()
        self._lock = threading.RLock()
        self._ambient: Hashable = None

    def __len__(self) -> int:
        return sum(entry.captured is not None for entry in self._entries.values())

    def refresh(self, *modules: nn.Module) -> None:
        """Notices what changed in ``modules`` since their last look; do this before :meth:`run`.

        It is apart from :meth:`run` so that it can happen while the device is busy and the host would only wait.
        Graphs that read weights from where they are no longer are dropped. Settings of the process are read, too.
        """
        with self._lock:
            for module in modules:
                watch = self._watches.get(id(module))
                if watch is None:
                    watch = self._watches[id(module)] = ModelState(module)
                else:
                    watch.refresh()
                if self._versions.get(id(module), watch.version) != watch.version:
                    self._drop(id(module))
                self._versions[id(module)] = watch.version
            self._ambient = ambient()

    def run(
        self,
        modules: Sequence[nn.Module],
        label: Hashable,
        function: Callable[[Any], Any],
        inputs: Any,
        obstacle: str = "",
    ) -> tuple[Any, bool]:
        """Calls ``function(inputs)``.

        Args:
            modules: Whose weights and switches the function reads; each was given to :meth:`look`.
            label: Names all else that the function depends on: the same label, modules and inputs mean the same result.
            function: Its effect is its result; it is not called at all when a graph is replayed.
            inputs: Nested dicts, lists and tuples. Tensors are copied into the graph's own, all other values select the
                graph, so whatever varies from step to step has to be a tensor.
            obstacle: Why the caller knows that this cannot be captured, if it does.

        Returns:
            What ``function`` returned, in memory of its own, and whether a graph computed it.
        """
        leaves, structure = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        obstacle = obstacle or self._obstacle(modules, tensors)
        if not obstacle:
            try:
                key = _Key(
                    tuple(map(id, modules)),
                    label,
                    structure,
                    tuple(map(_value, leaves)),
                    tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
                    tuple(self._watches[id(module)].switches for module in modules),
                    self._ambient,
                )
            except TypeError:
                kinds = {type(leaf).__name__ for leaf in leaves if type(leaf).__hash__ is None}
                obstacle = f"an argument of type {', '.join(sorted(kinds)) or 'unknown'} cannot select a graph"
        if obstacle:
            self._log(obstacle)
            return function(inputs), False
        with self._lock, torch.no_grad():
            entry = self._entry(key, function, leaves, structure)
            if entry.captured is not None:
                self._capture.follow(tensors[0].device)
                _fill(entry.groups, tensors)
                entry.captured.replay()
                return pytree.tree_map_only(torch.Tensor, torch.clone, entry.captured.outputs), True
        return function(inputs), False

    def clear(self) -> None:
        """Drops every graph and the memory they share."""
        with self._lock:
            self._drop()
            self._watches.clear()
            self._versions.clear()

    def _obstacle(self, modules: Sequence[nn.Module], tensors: Sequence[torch.Tensor]) -> str:
        wanted = self._capture.device_type
        for tensor in tensors:
            if tensor.device.type != wanted:
                return f"an input is on {tensor.device}, graphs are captured on {wanted}"
        if torch.is_grad_enabled() and (
            any(t.requires_grad for t in tensors) or any(p.requires_grad for m in modules for p in m.parameters())
        ):
            return "autograd records; use torch.no_grad()"
        return next(filter(None, (self._watches[id(module)].obstacle for module in modules)), "")

    def _entry(
        self, key: _Key, function: Callable[[Any], Any], leaves: list[Any], structure: pytree.TreeSpec
    ) -> _Entry:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(entry.key)  # the key itself: an equal one would be compared again
            return entry
        while len(self._entries) >= self._limit:
            self._release(self._entries.popitem(last=False)[1])
        try:
            entry = self._captured(key, function, leaves, structure)
        except Exception as error:
            # eager execution may well succeed, and if it does not, it raises the error where the user expects it
            self._log(f"capture failed with {type(error).__name__}: {error}")
            entry = _Entry(key, None, [])
        self._entries[key] = entry
        return entry

    def _captured(
        self, key: _Key, function: Callable[[Any], Any], leaves: list[Any], structure: pytree.TreeSpec
    ) -> _Entry:
        static: list[Any] = list(leaves)
        groups: dict[Hashable, tuple[list[int], list[torch.Tensor]]] = {}
        position = 0
        with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
            for index, leaf in enumerate(leaves):
                if not isinstance(leaf, torch.Tensor):
                    continue
                static[index] = torch.empty_like(leaf, requires_grad=False)
                # one fused copy per group: it takes one dtype, and tensors laid out alike
                positions, statics = groups.setdefault((leaf.dtype, leaf.is_contiguous()), ([], []))
                positions.append(position)
                statics.append(static[index])
                position += 1
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        device = tensors[0].device
        self._capture.follow(device)
        _fill(list(groups.values()), tensors)
        # unflattened anew for every call: forwards are free to take things out of the dicts they are given
        with _no_autocast_cache():
            captured = self._capture.capture(lambda: function(pytree.tree_unflatten(static, structure)), device)
        return _Entry(key, captured, list(groups.values()))

    def _drop(self, module: int | None = None) -> None:
        """Drops the graphs that read a module, given by its id, or all."""
        for key in [key for key in self._entries if module is None or module in key.modules]:
            self._release(self._entries.pop(key))

    def _release(self, entry: _Entry) -> None:
        if entry.captured is not None:
            self._capture.release(entry.captured)

    def _log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("runs without a CUDA graph: %s", reason)


def _value(leaf: Any) -> Hashable:
    """What selects a graph by a value: 1, 1.0 and True are equal, as are 0.0 and -0.0, and NaN equals nothing."""
    if isinstance(leaf, torch.Tensor):
        return None
    return type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf


def _fill(groups: _Groups, tensors: Sequence[torch.Tensor]) -> None:
    for positions, statics in groups:
        torch._foreach_copy_(statics, [tensors[position] for position in positions])


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps what it made of a weight until its context ends; a graph would read it there ever after."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
