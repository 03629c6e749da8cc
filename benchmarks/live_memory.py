"""How many bytes of tensors live at once while something runs, on any device, weights that were there before left out.

PyTorch counts that on CUDA alone. Here every operation's results are followed until they are freed: what an allocator
keeps beyond that, and what an operation uses inside, is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """The most bytes of storages that lived at once.

    Attributes:
        bytes: So many.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __contains__(self, storage: StorageWeakRef) -> bool:
        return storage in self._live

    def add(self, storages: Mapping[StorageWeakRef, int]) -> None:
        """Takes in storages that live now, with their bytes, and forgets those that are gone."""
        self._live |= storages
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        self.bytes = max(self.bytes, sum(self._live.values()))


class LiveMemory(TorchDispatchMode):
    """Within the context, follows the tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._made = Peak()
        self._before: set[StorageWeakRef] = set()

    @property
    def peak(self) -> int:
        """Most bytes that lived at once."""
        return self._made.bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage not in self._made:
                self._before.add(storage)
        result = function(*args, **(kwargs or {}))
        self._made.add({s: size for s, size in _storages(result).items() if s not in self._before})
        # an address may be taken again
        self._before = {storage for storage in self._before if not storage.expired()}
        return result


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}
