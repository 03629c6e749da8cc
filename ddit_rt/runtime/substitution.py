"""Modules whose results are known before the model that they are part of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Given(nn.Module):
    """Returns a tensor, whatever it is called with.

    It is a buffer: compiled code reads it where it finds it, and is not made anew for another one.
    """

    result: torch.Tensor

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("result", result, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.result


def _there(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in filter(None, path.split(".")):
        found = None if found is None else found._modules.get(name)
    return found


@contextmanager
def substituted(module: nn.Module, results: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the context, the submodules at the paths of ``results`` give these; afterwards all is as it was.

    A path that leads nowhere is passed over: caches run a model without its blocks.
    """
    kept: list[tuple[nn.Module, str, nn.Module | None]] = []
    try:
        for path, result in results.items():
            parent_path, _, name = path.rpartition(".")
            parent = _there(module, parent_path)
            if parent is None:
                continue
            kept.append((parent, name, parent._modules[name]))
            parent._modules[name] = Given(result)
        yield
    finally:
        for parent, name, child in kept:
            parent._modules[name] = child
