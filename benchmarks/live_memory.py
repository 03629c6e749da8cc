"""How many bytes of tensors live at once while something runs, on any device, weights that were there before left out.

PyTorch counts that on CUDA alone. Here every operation's results are followed until they are freed: what an allocator
keeps beyond that, and what an operation uses inside, is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within the context, follows the tensors that operations make.

    Attributes:
        peak: Most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}
        self._before: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage not in self._live:
                self._before.add(storage)
        result = function(*args, **(kwargs or {}))
        self._live |= {s: size for s, size in _storages(result).items() if s not in self._before}
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        # an address may be taken again
        self._before = {storage for storage in self._before if not storage.expired()}
        self.peak = max(self.peak, sum(self._live.values()))
        return result


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}
