"""Judges an accelerated call by the plain call before it."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddit_rt
from ddit_rt.families import FAMILIES

# settings of the accelerated call, by mode
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"threshold": 0},
    "coarse": {"schedule": lambda index, patch_std: (1, 2, 4)[index % 3]},
    "coarser": {"schedule": lambda index, patch_std: (1, 4, 2)[index % 3]},
}
MODES = ("plain", *SETTINGS)


class CallMismatch(AssertionError):
    """An accelerated call did not do what the plain one did."""


@dataclass
class Judge:
    """Runs every call plain, then accelerated, with random number generators in the same state.

    Attributes:
        mode: One of :data:`SETTINGS`.
        calls: Calls that were compared.
        raised: Those of them in which plain and accelerated raised the same error.
        refused: What ``accelerate`` said to pipelines that it refused; their calls run plain.
        mismatches: What differed, call by call.
    """

    mode: str
    calls: int = 0
    raised: int = 0
    refused: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    _inside: threading.local = field(default_factory=threading.local)

    def __call__(self, call: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of the accelerated call.

        Raises:
            CallMismatch: it is not that of the plain one, or raised where that did not.
        """
        if getattr(self._inside, "call", False):
            return call(pipe, *args, **kwargs)
        self._inside.call = True
        try:
            return self._judged(call, pipe, args, kwargs)
        finally:
            self._inside.call = False

    def _judged(self, call: Callable[..., Any], pipe: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        rewind = _randomness(args, kwargs)
        plain, plain_error = _outcome(call, pipe, args, kwargs)
        if isinstance(plain_error, pytest.skip.Exception):
            raise plain_error
        after = _randomness(args, kwargs)
        try:
            ddit_rt.accelerate(pipe, **SETTINGS[self.mode])
        except ddit_rt.DDiTError as refusal:
            self.refused.append(f"{type(refusal).__name__}: {refusal}")
            if plain_error is not None:
                raise plain_error from None
            return plain
        rewind()
        try:
            result, error = _outcome(call, pipe, args, kwargs)
        finally:
            ddit_rt.restore(pipe)
        self.calls += 1
        difference = _error_difference(plain_error, error)
        if not difference and error is None:
            difference = _differences(plain, result, self.mode == "exact")
        if difference:
            self.mismatches.append(f"{type(pipe).__name__}: {difference}")
            raise CallMismatch(self.mismatches[-1]) from error
        after()
        if error is not None:
            self.raised += 1
            raise error
        return result


@contextmanager
def judged(judge: Judge) -> Iterator[Judge]:
    """Within the context, every call of a supported pipeline class goes through ``judge``."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in {cls for family in FAMILIES for cls in family.pipelines}:
            patch.setattr(cls, "__call__", _through(judge, cls.__call__))
        yield judge


def _through(judge: Judge, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return judge(original, pipe, *args, **kwargs)

    return call


def _outcome(call: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> tuple[Any, BaseException | None]:
    try:
        return call(pipe, *args, **kwargs), None
    except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
        return None, error


def _randomness(args: Any, kwargs: Mapping[str, Any]) -> Callable[[], None]:
    """Remembers all generators that a call may draw from; what it returns puts them back."""
    generators = [leaf for leaf in _leaves([args, dict(kwargs)]) if isinstance(leaf, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (the global one)

    def rewind() -> None:
        for generator, state in zip(generators, states):
            generator.set_state(state)
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])

    return rewind


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _error_difference(plain: BaseException | None, error: BaseException | None) -> str:
    if plain is None and error is None:
        return ""
    if type(plain) is type(error) and str(plain) == str(error):
        return ""
    return f"plain {_told(plain)}, accelerated {_told(error)}"


def _told(error: BaseException | None) -> str:
    return "raised nothing" if error is None else f"raised {type(error).__name__}: {error}"


def _differences(plain: Any, result: Any, exact: bool) -> str:
    """What is different about two outputs; coarse ones have to agree in form and in being finite only."""
    if type(plain) is not type(result):
        return f"a {type(plain).__name__} became a {type(result).__name__}"
    expected, found = list(_leaves(plain)), list(_leaves(result))
    if len(expected) != len(found):
        return f"{len(expected)} outputs became {len(found)}"
    for index, (one, other) in enumerate(zip(expected, found)):
        if type(one) is not type(other):
            return f"output {index}: a {type(one).__name__} became a {type(other).__name__}"
        if not isinstance(one, torch.Tensor | np.ndarray | Image.Image):
            continue
        if isinstance(one, torch.Tensor) and one.device != other.device:
            return f"output {index}: {one.device} became {other.device}"
        first, second = _array(one), _array(other)
        if first.shape != second.shape or first.dtype != second.dtype:
            return f"output {index}: {first.dtype} {first.shape} became {second.dtype} {second.shape}"
        if exact and not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
            return f"output {index}: values differ by up to {np.nanmax(np.abs(first - second))}"
        if np.isfinite(first).all() and not np.isfinite(second).all():
            return f"output {index} is not finite"
    return ""


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        # numpy has no bfloat16; float32 holds all its values
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)
