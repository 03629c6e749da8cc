"""FLOP of the transformer as executed, one yardstick for every method, caches inside the model included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..families import denoisers, family_of
from ..runtime import MethodPatch, installed


@dataclass
class FlopCount:
    """``total`` floating-point operations (2 per multiply-add) of matrix products and attention so far."""

    total: float = 0.0


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts attention on CUDA only
_EXTRA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


class _Unnamed:
    """In place of the counter's record of module names, which never ends where modules hold each other (cache-dit)."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def counted_flops(pipe: Any) -> Iterator[FlopCount]:
    """Within the context, counts what the transformers of ``pipe`` execute. Slows them down: never time these runs.

    Enter it before :func:`ddit_rt.accelerate`, with ``cuda_graphs=False``: what a graph replays is not seen. Enter it
    after another library was put on, which may replace what is counted here.
    """
    count = FlopCount()

    def handle(inner: Any, *args: Any, **kwargs: Any) -> Any:
        counter = FlopCounterMode(display=False, custom_mapping=_EXTRA)
        counter.mod_tracker = _Unnamed()
        with counter:
            result = inner(*args, **kwargs)
        count.total += counter.get_total_flops()
        return result

    patches = [MethodPatch(module, "forward", handle) for module in denoisers(pipe, family_of(pipe)).values()]
    with installed(patches):
        yield count
