"""pytest-benchmark suite of ddit_rt.ops: ``pytest benchmarks/test_kernels.py --benchmark-enable``.

The PyTorch paths run anywhere, since they are what runs in production on a CPU; the kernels need a CUDA device. For
measurements to quote use ``gpu_suite.py``: it controls caches and launches, and knows the machine's ceilings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddit_rt import ops

CUDA = torch.cuda.is_available()
BACKENDS = [
    "torch",
    pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
LATENTS = {
    "demo 32x32": (1, 4, 32, 32),
    "FLUX 512": (1, 16, 64, 64),
    "FLUX 1024": (1, 16, 128, 128),
    "Wan 480p x 81": (1, 16, 21, 60, 104),
}


def measured(benchmark: Any, function: Callable[[], torch.Tensor]) -> None:
    def run() -> None:
        function()
        if CUDA:
            torch.cuda.synchronize()

    run()
    benchmark(run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("what", ["select_multiple", "latent_evolution"])
def test_evolution(benchmark: Any, what: str, name: str, backend: str) -> None:
    increments = [torch.randn(LATENTS[name], device=DEVICE) for _ in range(3)]
    if what == "select_multiple":
        measured(benchmark, lambda: ops.select_multiple(increments, (4, 8), 0.4, 1e-3, backend=backend))
    else:
        measured(benchmark, lambda: ops.latent_evolution(increments, (4, 8), 0.4, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", ["demo 32x32", "FLUX 512"])
def test_patch_embed(benchmark: Any, name: str, size: int, backend: str) -> None:
    latent = torch.randn(LATENTS[name], device=DEVICE, dtype=DTYPE)
    weight = torch.randn(768, latent.shape[1], size, size, device=DEVICE, dtype=DTYPE)
    measured(benchmark, lambda: ops.patch_embed(latent, weight, None, size, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", ["demo 32x32", "FLUX 512"])
def test_patch_deembed(benchmark: Any, name: str, size: int, backend: str) -> None:
    batch, channels, height, width = LATENTS[name]
    grid = (height // size, width // size)
    tokens = torch.randn(batch, math.prod(grid), 768, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(size * size * channels, 768, device=DEVICE, dtype=DTYPE)
    measured(benchmark, lambda: ops.patch_deembed(tokens, weight, None, size, grid, backend=backend))
