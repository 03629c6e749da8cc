"""Many calls: nothing of a call is left when it is over, and memory stays flat.

``DDIT_SOAK_CALLS`` sets how many calls the long test makes (default 60; 1000 take some minutes).
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from adapters import trained
from recorded import recorded
from shared_pipelines import SETTINGS, accelerate, mixed
from tiny import flux, flux_inputs, latents_of, negative, wan, wan_inputs

import ddit_rt
from ddit_rt.runtime import Recording

CALLS = int(os.environ.get("DDIT_SOAK_CALLS", "60"))


@contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors() -> dict[int, torch.Size]:
    """Every tensor that Python knows of: id -> shape."""
    return {id(obj): obj.shape for obj in gc.get_objects() if issubclass(type(obj), torch.Tensor)}


def watched_call(pipe: Any, inputs: dict[str, Any]) -> dict[str, weakref.ref]:
    """Makes a call and forgets its inputs and outputs; what it returns tells which of them are alive still."""
    refs: dict[str, weakref.ref] = {}
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    refs |= {name: weakref.ref(value) for name, value in given.items() if isinstance(value, torch.Tensor)}

    def watch(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        refs.update({f"{name} after step {index}": weakref.ref(tensor) for name, tensor in tensors.items()})
        return {}

    refs["result"] = weakref.ref(latents_of(pipe, {**given, "callback_on_step_end": watch}))
    return refs


def left(refs: dict[str, weakref.ref]) -> list[str]:
    return [name for name, ref in refs.items() if ref() is not None]


# -- one call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *SETTINGS])
def test_nothing_refers_to_a_tensor_of_a_call_that_is_over(name):
    pipe = flux()
    if name is not None:
        accelerate(pipe, name)
    inputs = negative(flux_inputs(steps=4, latents=torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))))
    latents_of(pipe, inputs)
    with collector_off():
        assert not left(watched_call(pipe, inputs))


@pytest.mark.parametrize("accelerated", [False, True])
def test_nothing_refers_to_a_tensor_of_a_video_call_that_is_over(accelerated):
    pipe, inputs = wan(two=True), wan_inputs(steps=6)
    if accelerated:
        ddit_rt.accelerate(pipe, schedule=mixed)
    latents_of(pipe, inputs)
    with collector_off():
        assert not left(watched_call(pipe, inputs))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_nothing_refers_to_a_tensor_of_a_call_through_graphs_that_is_over(with_adapter):
    pipe = flux()
    recorded(pipe, trained(pipe) if with_adapter else None, schedule=mixed)
    latents_of(pipe, flux_inputs(steps=4))
    with collector_off():
        assert not left(watched_call(pipe, flux_inputs(steps=4)))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_call_leaves_no_tensor_behind(name):
    """Views and predictions, too, which the test above does not see."""
    pipe, inputs = accelerate(flux(), name), flux_inputs(steps=4)
    latents_of(pipe, inputs)
    with collector_off():
        before = tensors()
        latents_of(pipe, inputs)
        assert not [shape for key, shape in tensors().items() if key not in before and shape.numel() > 16]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_collector_frees_what_a_call_leaves_behind(name):
    pipe = accelerate(flux(), name)
    inputs = flux_inputs(steps=4)
    latents_of(pipe, inputs)
    refs = watched_call(pipe, inputs)
    gc.collect()
    assert not left(refs)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["mixed", "adapter"])
def test_an_interrupted_call_leaves_no_tensor_behind(name, error):
    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            raise error
        return {}

    pipe, inputs = accelerate(flux(), name), flux_inputs(steps=4)
    latents_of(pipe, inputs)
    gc.collect()
    before = tensors()
    with pytest.raises(error):
        latents_of(pipe, {**inputs, "callback_on_step_end": stop})
    gc.collect()
    assert not [shape for key, shape in tensors().items() if key not in before and shape.numel() > 16]


@pytest.mark.parametrize("name", SETTINGS)
def test_restore_leaves_nothing_of_the_acceleration_behind(name):
    pipe, inputs = flux(), flux_inputs(steps=4)
    plain = latents_of(pipe, inputs)
    gc.collect()
    before = tensors()
    accelerate(pipe, name)
    refs = {"session": weakref.ref(ddit_rt.pipeline.find_accelerated(pipe))}
    latents_of(pipe, inputs)
    ddit_rt.restore(pipe)
    gc.collect()
    assert not left(refs)
    # the scheduler keeps the timesteps of its last call
    assert not [shape for key, shape in tensors().items() if key not in before and shape.numel() > 16]
    assert torch.equal(latents_of(pipe, inputs), plain)


# -- many calls -----------------------------------------------------------------------------------------------------

SIZES = ((64, 64), (40, 64), (48, 32), (72, 40))
RESIDENT = 24 * 2**20  # bytes that the allocator may keep back; a leak of each call's latents alone is more in 1000


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def requests(kind: str) -> list[dict[str, Any]]:
    """Calls of several sizes, lengths and batches, with guidance and without."""
    if kind == "wan":
        return [wan_inputs(height=h, width=w, steps=4) for h, w in ((64, 96), (48, 80))] + [
            wan_inputs(batch=2, steps=3)
        ]
    found = [flux_inputs(height=h, width=w, steps=4) for h, w in SIZES]
    return [*found, negative(flux_inputs(steps=3)), flux_inputs(batch=2, steps=3)]


def recorded_pipe(pipe: Any, **settings: Any) -> tuple[Any, Recording]:
    adapter = trained(pipe) if settings.pop("adapter", False) else None
    return pipe, recorded(pipe, adapter, schedule=mixed, **settings)


LONG: dict[str, Any] = {
    "mixed": lambda: (accelerate(flux(), "mixed"), None),
    "adapter": lambda: (accelerate(flux(), "adapter"), None),
    "teacache": lambda: (accelerate(flux(), "teacache"), None),
    "wan": lambda: (ddit_rt.accelerate(wan(two=True), schedule=mixed), None),
    "graphs": lambda: recorded_pipe(flux(), max_graphs=4),
    "graphs-adapter": lambda: recorded_pipe(flux(), max_graphs=4, adapter=True),
}


@pytest.mark.parametrize("name", LONG)
def test_memory_stays_flat_over_many_calls(name):
    pipe, recording = LONG[name]()
    calls = requests("wan" if name == "wan" else "flux")[: None if recording is None else 3]
    rounds = max(3, CALLS // len(LONG) // len(calls))

    def once() -> dict[int, torch.Size]:
        for inputs in calls:
            latents_of(pipe, inputs)
            assert ddit_rt.report(pipe).complete
        gc.collect()
        return tensors()

    for _ in range(2):
        counts = [len(once())]
    begin = resident()
    for _ in range(rounds - 2):
        counts.append(len(once()))
        if recording is not None:
            assert len(recording.live) <= 4 and recording.released > 0
    assert len(set(counts)) == 1, counts
    assert resident() - begin < RESIDENT


def test_memory_stays_flat_over_accelerate_and_restore():
    pipe, inputs = flux(), flux_inputs(steps=2, height=32, width=32)
    plain = latents_of(pipe, inputs)

    def once() -> int:
        for name in SETTINGS:
            accelerate(pipe, name)
            latents_of(pipe, inputs)
        ddit_rt.restore(pipe)
        gc.collect()
        return len(tensors())

    once()
    begin = resident()
    counts = [once() for _ in range(max(2, CALLS // 20))]
    assert len(set(counts)) == 1, counts
    assert resident() - begin < RESIDENT
    assert torch.equal(latents_of(pipe, inputs), plain)
