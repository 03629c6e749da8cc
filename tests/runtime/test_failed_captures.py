"""What a capture that fails leaves behind, on a CUDA runtime that keeps books by PyTorch's rules."""

import pytest
import torch
from fake_cuda import FakeCuda

from ddit_rt.runtime import CudaGraphs

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def works(cuda):
    """A function that uses random numbers, as eager execution does too."""
    return lambda: cuda.generators[1].draw()


def settled(cuda):
    """Nothing is captured, no allocation is redirected, and random numbers can be drawn."""
    with cuda.device(1):
        cuda.generators[1].draw()
        assert not cuda.is_current_stream_capturing() and cuda.current_stream().name == "default"
    assert not cuda.open and cuda.current_device() == 0


def test_a_capture_runs_on_the_tensors_device_and_ends(cuda):
    graphs = CudaGraphs()
    captured = graphs.capture(works(cuda), DEVICE)
    settled(cuda)
    captured.replay()
    assert sum(cuda.users.values()) == 1


def breaks_in_cuda(cuda):
    def function():
        cuda.breaks_the_capture()

    return function


def leaves_its_stream(cuda):
    def function():
        if cuda.is_current_stream_capturing():
            cuda.set_stream(cuda.default_stream())
            raise ValueError("the user's own mistake")

    return function


def raises_in_python(cuda):
    def function():
        if cuda.is_current_stream_capturing():
            raise ValueError("the user's own mistake")

    return function


@pytest.mark.parametrize("function", [breaks_in_cuda, leaves_its_stream, raises_in_python])
@pytest.mark.parametrize("live", [0, 1])
def test_after_a_failed_capture_eager_execution_and_further_captures_work(cuda, function, live):
    graphs = CudaGraphs()
    for _ in range(live):
        graphs.capture(works(cuda), DEVICE)
    held = sum(cuda.users.values())
    with pytest.raises((RuntimeError, ValueError)):
        graphs.capture(function(cuda), DEVICE)
    settled(cuda)
    if function is breaks_in_cuda:  # elsewhere the graph has an end, and lets go of the pool itself
        assert sum(cuda.users.values()) == held
    graphs.capture(works(cuda), DEVICE)
    settled(cuda)


def test_a_failed_warm_up_is_no_failed_capture(cuda):
    def function():
        raise ValueError("the user's own mistake")

    state = cuda.generators[1].state
    with pytest.raises(ValueError, match="own mistake"):
        CudaGraphs().capture(function, DEVICE)
    settled(cuda)
    assert cuda.generators[1].state is state
