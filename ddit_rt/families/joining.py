"""The arguments of two transformer calls as those of one call for twice the batch.

Guidance calls the transformer for a prompt and for a negative prompt with the same latent. What the two calls are given
beside it may differ in values, not in shape: a model sees every sample of a batch by itself only where no padding or
mask has to be made up to bring two samples to one length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family


class NotJoinedError(Exception):
    """Two calls cannot be one; the text says why. They run one after the other."""


class Joiner:
    """Joins calls of one family, and keeps what it made as long as the next join asks for it again.

    Text embeddings are the same tensors in every step, and so is what is made of them: memory and time are spent once,
    and whoever keeps something by a tensor's identity finds it again.

    Args:
        family: Of the transformer.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[tuple[object, ...], tuple[Any, ...]] = {}
        self._before: dict[tuple[object, ...], tuple[Any, ...]] = {}

    def begin(self) -> None:
        """Another step begins: what was not asked for since the last call of this is forgotten."""
        self._before, self._known = self._known, {}

    def joined(self, first: Mapping[str, Any], second: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """Arguments of one call whose samples are those of ``first``, then those of ``second``.

        Args:
            first, second: Arguments of calls for ``batch`` samples each, by name.
            batch: B.

        Raises:
            NotJoinedError: naming the argument in which they differ too much.
        """
        found = {}
        for name in (*first, *(name for name in second if name not in first)):
            pair = (first.get(name), second.get(name))
            if name in self._family.shared_arguments:
                found[name] = self._shared(name, *pair)
            elif name in self._family.listed_arguments:
                found[name] = _listed(name, *pair)
            else:
                found[name] = self._value(name, *pair, batch)
        return found

    def _value(self, name: str, first: Any, second: Any, batch: int) -> Any:
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
            return self._tensor(name, first, second, batch)
        if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
            return {key: self._value(f"{name}[{key!r}]", first[key], second[key], batch) for key in first}
        lists = isinstance(first, list | tuple) and isinstance(second, list | tuple)
        if lists and len(first) == len(second):
            pairs = enumerate(zip(first, second))
            return type(first)(self._value(f"{name}[{i}]", *pair, batch) for i, pair in pairs)
        if type(first) is not type(second):
            raise NotJoinedError(f"{name} is {_kind(first)} for one prompt and {_kind(second)} for the other")
        if first is not second and first != second:
            raise NotJoinedError(f"{name} is not the same for both prompts")
        return first

    def _tensor(self, name: str, first: torch.Tensor, second: torch.Tensor, batch: int) -> torch.Tensor:
        if first.ndim == 0 or second.ndim == 0:
            return self._shared(name, first, second)  # type: ignore[no-any-return]
        if first.shape != second.shape:
            shapes = f"{tuple(first.shape)} for one prompt and {tuple(second.shape)} for the other"
            raise NotJoinedError(f"{name} has shape {shapes}")
        if (first.dtype, first.device) != (second.dtype, second.device):
            raise NotJoinedError(f"{name} has another dtype or device for each prompt")
        if len(first) % batch:
            raise NotJoinedError(f"{name} of shape {tuple(first.shape)} is not one per sample of {batch}")
        return self._kept((name, *_identity(first), *_identity(second)), first, second, torch.cat)

    def _shared(self, name: str, first: Any, second: Any) -> Any:
        """What has no batch dimension, which has to be the same; values are compared once per pair of tensors."""
        if first is second:
            return first
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
            raise NotJoinedError(f"{name} is given for one prompt only")
        if first.shape != second.shape:
            raise NotJoinedError(
                f"{name} has shape {tuple(first.shape)} for one prompt and {tuple(second.shape)} for the other"
            )
        key = (name, *_identity(first), *_identity(second))
        if self._kept(key, first, second, lambda pair: pair[0] if same_tensor(*pair) else None) is None:
            raise NotJoinedError(f"{name} is not the same for both prompts")
        return first

    def _kept(self, key: tuple[object, ...], first: torch.Tensor, second: torch.Tensor, make: Any) -> Any:
        if first.is_inference() or second.is_inference():
            return make([first, second])  # a change in place would leave no trace
        entry = self._known.get(key) or self._before.get(key)
        if entry is None:
            # with what it was made of, so that no other tensors take their identity
            entry = (first, second, make([first, second]))
        self._known[key] = entry
        return entry[2]


def _listed(name: str, first: Any, second: Any) -> Any:
    """What holds an entry per sample."""
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise NotJoinedError(f"{name} is given for one prompt only")
    return [*first, *second]


def expected_second(
    family: Family, before: tuple[Mapping[str, Any], Mapping[str, Any]], now: Mapping[str, Any]
) -> dict[str, Any]:
    """What the second call of a step will be given, from the two calls of the last step and the first of this one.

    Whatever both calls shared they will share again; the rest stays what it was, and latent and noise level are those
    of the step.

    Args:
        family: Of the transformer.
        before: Arguments of the last step's calls, by name.
        now: Of this step's first call.

    Raises:
        NotJoinedError: the last step's calls were given the same, so that they differ in something that is not seen.
    """
    of_step = {family.latent_argument, family.time_argument}
    first, second = before
    alike = {name: _alike(first.get(name), value) for name, value in second.items() if name not in of_step}
    if all(alike.values()):
        raise NotJoinedError("both calls of the last step were given the same, and yet there were two")
    return {
        name: now[name] if name in of_step else _carried(first.get(name), value, now.get(name))
        for name, value in second.items()
    }


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_alike(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_alike, first, second))
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return first is second
    return first is second or bool(first == second)


def _carried(first: Any, second: Any, now: Any) -> Any:
    if isinstance(first, Mapping) and isinstance(second, Mapping) and isinstance(now, Mapping):
        return {key: _carried(first.get(key), value, now.get(key)) for key, value in second.items()}
    return now if second is first else second


class Expectation:
    """Arguments that a call is expected to have, as they are now: what is changed in place later is noticed.

    Args:
        arguments: By name.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        # of every tensor, wherever it stands
        self._versions: dict[int, int] = {}
        self._note(arguments)

    def met_by(self, given: Mapping[str, Any], valueless: frozenset[str] = frozenset()) -> bool:
        """Whether a call was given these. Tensors in other memory are compared by value, which waits for the device.

        Args:
            given: Arguments of the call, by name.
            valueless: Tensor arguments of which shape and dtype alone are looked at.
        """
        for name in {*self.arguments, *given}:
            ours, theirs = self.arguments.get(name), given.get(name)
            if name in valueless:
                if not (isinstance(theirs, torch.Tensor) and _form(ours) == _form(theirs)):
                    return False
            elif not self._same(ours, theirs):
                return False
        return True

    def _same(self, ours: Any, theirs: Any) -> bool:
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            return self._versions[id(ours)] == _version(ours) and same_tensor(ours, theirs)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            return ours.keys() == theirs.keys() and all(self._same(ours[key], theirs[key]) for key in ours)
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
            return len(ours) == len(theirs) and all(map(self._same, ours, theirs))
        if isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor):
            return False
        return ours is theirs or bool(ours == theirs)

    def _note(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._versions[id(value)] = _version(value)
        elif isinstance(value, Mapping):
            for entry in value.values():
                self._note(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                self._note(entry)


def same_tensor(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors hold the same; where they lie in other memory, it waits for the device."""
    if first is second:
        return True
    if _form(first) != _form(second):
        return False
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
        return True
    return torch.equal(first, second)


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors count none


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), _version(tensor)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
