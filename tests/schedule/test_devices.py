"""Latents on another device than the current one, on a CUDA runtime that keeps books."""

from types import SimpleNamespace

import pytest
import torch
from ddit_kernels import _workspace
from ddit_kernels.evolve import evolve
from fake_cuda import FakeCuda

from ddit_rt import ops
from ddit_rt.ops import operations
from ddit_rt.pipeline.call_state import stopwatch
from ddit_rt.schedule import PendingEvolution, evolution

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    evolution._side_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    evolution._side_stream.cache_clear()


@pytest.fixture
def pending(cuda, monkeypatch):
    """An evolution under way on the second device, its launches noted in the log."""

    def launch(increments, sizes, quantile, threshold, packed, out, backend):
        cuda.log.append(("decision", cuda.current_stream(), out))

        def quantiles(stream):
            cuda.log.append(("values", cuda.current_stream(), stream))
            return torch.tensor([[0.25, 0.5]])

        return out.fill_(2), quantiles

    monkeypatch.setattr(evolution, "evolve", launch)
    row = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 2)
    increments = [SimpleNamespace(is_cuda=True, device=DEVICE, shape=(1, 4, 8, 8))]
    return PendingEvolution(increments, (2, 4), 2, 0.4, None, "auto", 1.0, SimpleNamespace(row=lambda: row))


def test_the_decision_is_awaited_on_the_latents_device(cuda, pending):
    main = cuda.default_stream(DEVICE)
    (decision,) = [entry for entry in cuda.log if entry[0] == "decision"]
    assert decision[1] is main and cuda.current_device() == 0
    assert pending.decision() == 4
    what, stream, event = cuda.log[-1]
    assert what == "synchronize" and stream is main
    assert cuda.log.index(("record", main, event)) > cuda.log.index(decision)


def test_the_values_go_beside_the_next_model_run(cuda, pending):
    main = cuda.default_stream(DEVICE)
    (_, aside, reader) = next(entry for entry in cuda.log if entry[0] == "values")
    assert aside is not main and aside.device == DEVICE and reader is aside
    decided = next(event for what, stream, event in cuda.log if what == "record" and stream is main)
    assert cuda.log.index(("wait", aside, decided)) < cuda.log.index(("values", aside, aside))
    assert not [entry for entry in cuda.log if entry[:2] == ("wait", main)]
    assert pending.wait() == {2: 0.25, 4: 0.5} and cuda.log[-1][:2] == ("synchronize", aside)
    assert cuda.current_stream(DEVICE) is main


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memory_read_on_another_stream_is_not_reused_before(monkeypatch, backend):
    held = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: held.append((tensor.shape, stream)))
    if backend == "triton":
        monkeypatch.setattr("ddit_kernels.evolve.resolve_backend", lambda *_: "triton")
        monkeypatch.setattr("ddit_kernels.evolve.evolution_select", lambda *_: torch.ones(1, 20))
        monkeypatch.setattr("ddit_kernels.evolve.patch_std_quantile", lambda *_: torch.ones(1, 2))
    _, quantiles = evolve([torch.zeros(1, 4, 8, 8)], (2, 4), 0.4, 1.0, backend=backend)
    assert quantiles().shape == (1, 2) and not held
    assert quantiles("aside").shape == (1, 2)
    assert held == [((1, 2) if backend == "torch" else (1, 20), "aside")]


def test_an_events_stream_is_that_of_the_increments(cuda, monkeypatch):
    monkeypatch.setattr(operations, "check_evolution", lambda *_: None)
    monkeypatch.setattr(operations, "check_decision", lambda *_: None)
    monkeypatch.setattr(operations, "evolve", lambda *_: (None, lambda: None))
    event = torch.cuda.Event()
    ops.evolve_and_select([SimpleNamespace(device=DEVICE)], (2,), 0.4, 1.0, decided=event)
    assert event.stream is cuda.default_stream(DEVICE)


def test_a_step_is_timed_on_the_latents_device(cuda):
    seconds = stopwatch(DEVICE)()
    recorded = [stream for what, stream, _ in cuda.log if what == "record"]
    assert recorded == [cuda.default_stream(DEVICE)] * 2 and seconds() == 1e-3


def test_counters_in_a_captured_graph_are_the_graphs_own(cuda, monkeypatch):
    arena = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setitem(_workspace._arenas, DEVICE, (arena, 0))
    with cuda.device(DEVICE), cuda.stream(torch.cuda.Stream()):
        torch.cuda.CUDAGraph().capture_begin((0, 1))
        with cuda.device(0):
            assert _workspace.zeroed(DEVICE, 16).data_ptr() == arena.data_ptr()
