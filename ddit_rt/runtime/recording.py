"""Captures graphs on the CPU, under the rules of CUDA graphs.

While a function is captured, every operation is recorded with the memory it reads and writes; a replay repeats the
operations on that memory, and runs no Python of the function. So a replay sees new values in static inputs and in
weights changed in place, but not a weight that moved, nor a scalar or a switch of Python. Outputs share one pool: a
replay spoils the outputs of all other graphs. What CUDA refuses to capture is refused here too: reading a value on the
host, and tensors made from Python lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .graphs import Captured

REFUSED = {
    torch.ops.aten._local_scalar_dense.default: "a tensor's value is read on the host",
    torch.ops.aten.lift_fresh.default: "a tensor is made from Python values",
    torch.ops.aten.nonzero.default: "a shape depends on values",
}


class CaptureRefused(RuntimeError):
    """What CUDA would not capture."""


def _frozen(value: Any) -> Any:
    """The memory a tensor has now, whatever becomes of the tensor object."""
    return value.detach() if isinstance(value, torch.Tensor) else value


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED:
            raise CaptureRefused(REFUSED[func])
        kwargs = kwargs or {}
        # frozen before the call: an in-place operation may not change what it was given
        given = pytree.tree_map(_frozen, (args, kwargs))
        result = func(*args, **kwargs)
        self.operations.append((func, *given, pytree.tree_map(_frozen, result)))
        return result


@dataclass
class Recording:
    """A capture back-end; counts what it is asked to do."""

    device_type: str = "cpu"
    captures: int = 0
    replays: int = 0
    released: int = 0
    live: list[Captured] = field(default_factory=list)
    warmups: int = 0

    def capture(self, function: Any, device: torch.device) -> Captured:
        function()
        self.warmups += 1
        recorder = _Recorder()
        with recorder:
            outputs = function()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():  # memory is memory: inference tensors are written to like others
                for other in self.live:
                    pytree.tree_map_only(torch.Tensor, _spoil, other.outputs)
                for func, args, kwargs, result in recorder.operations:
                    _repeat(func, args, kwargs, result)

        captured = Captured(replay, outputs)
        self.live.append(captured)
        return captured

    def follow(self, device: torch.device) -> None:
        assert device.type == self.device_type

    def release(self, captured: Captured) -> None:
        self.live.remove(captured)
        self.released += 1


def _spoil(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


def _repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    again = func(*args, **kwargs)
    for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again)):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)
