"""How the kernels are wired: registration, torch.compile, backends, ahead-of-time compilation, graphs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddit_kernels.latent_evolution import evolution_select
from ddit_kernels.patch_deembed import patch_deembed
from ddit_kernels.patch_embed import patch_embed
from ddit_kernels.patch_quantile import patch_std_quantile
from kernel_oracle import CUDA, DEVICE, HAS_TRITON, INTERPRETED, needs_kernels
from torch import library

from ddit_rt import ops

HERE = Path(__file__).parent
FLOORS = {"torch": (2, 8), "triton": (3, 4)}
once = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="runs where Triton is installed and compiles")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def child(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process: Triton reads TRITON_INTERPRET once, at import."""
    merged = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, *arguments], env=merged, capture_output=True, text=True, timeout=900)


def step(increments: list[torch.Tensor], weight: torch.Tensor, rows: torch.Tensor, backend: str):
    decision, quantiles = ops.evolve_and_select(increments, (2, 4), 0.4, 1.0, backend=backend)
    tokens = ops.patch_embed(increments[0], weight, None, 2, scale=quantiles[:, 0], backend=backend)
    latent = ops.patch_deembed(tokens, rows, None, 2, (4, 4), residual=increments[1], backend=backend)
    return decision, quantiles, tokens, latent


def inputs() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    increments = [torch.randn(2, 4, 8, 8, device=DEVICE) for _ in range(3)]
    return increments, torch.randn(8, 4, 2, 2, device=DEVICE), torch.randn(16, 8, device=DEVICE)


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    increments, weight, rows = inputs()
    decision = torch.empty(2, dtype=torch.int32, device=DEVICE)
    tokens, factor = torch.randn(2, 16, 8, device=DEVICE), torch.ones(2, device=DEVICE)
    library.opcheck(evolution_select, (increments, [2, 4], 0.4, 1e-3, None, decision))
    library.opcheck(patch_std_quantile, (torch.rand(2, 20, device=DEVICE), [16, 4], [2, 4], 0.4))
    library.opcheck(patch_embed, (increments[0], weight, None, 2, None, weight[:, 0, 0, 0], 1, 0.5, None, None))
    library.opcheck(
        patch_deembed,
        (tokens, rows.unflatten(0, (2, 2, 4)), None, 2, [4, 4], increments[0], 1.0, factor, 1, [8, 8], False),
    )


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
@torch.no_grad()
def test_compiles_without_a_graph_break(backend: str) -> None:
    arguments = inputs()
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    for actual, expected in zip(compiled(*arguments, backend), step(*arguments, backend)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="Triton can run here")
def test_triton_on_a_cpu_says_what_it_needs() -> None:
    with pytest.raises(ops.BackendError, match=r"TRITON_INTERPRET=1|not installed"):
        ops.latent_evolution(inputs()[0], (4,), 0.4, backend="triton")


@needs_kernels
def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (3,)  # which the kernel does not take
    monkeypatch.setenv("DDIT_BACKEND", "triton")
    with pytest.raises(ops.BackendError, match="DDIT_BACKEND"):
        ops.latent_evolution(inputs()[0], sizes, 0.4)
    monkeypatch.setenv("DDIT_BACKEND", "torch")
    assert ops.latent_evolution(inputs()[0], sizes, 0.4).shape == (2, 1)


def test_declared_floors_are_those_that_the_kernels_need() -> None:
    """Triton 3.2 knows no tuples in kernels, 3.3 no constant ones, and defines no tuned kernel without a GPU; PyTorch
    2.6 knows no list[int] in an operator. Torch 2.8 and Triton 3.4, which go together, compile and run every kernel."""
    text = (HERE.parents[1] / "setup.py").read_text()
    floors = {name: tuple(map(int, re.findall(r"\d+", re.search(f'"{name}>=([0-9.]+)', text)[1]))) for name in FLOORS}
    assert all(floors[name] >= floor for name, floor in FLOORS.items()), floors


def test_layout_that_survives_every_kind_of_install() -> None:
    root = HERE.parents[1]
    assert (root / "kernels" / "ddit_kernels" / "__init__.py").exists()
    assert not (root / "kernels" / "__init__.py").exists()  # Hugging Face's `kernels` package must stay importable


@once
def test_references_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from ddit_kernels._common import HAS_TRITON\n"
        "from ddit_kernels.latent_evolution import latent_evolution_reference\n"
        "from ddit_kernels import patch_deembed, patch_embed\n"
        "print(HAS_TRITON, latent_evolution_reference([torch.zeros(1, 1, 4, 4)], (2,), 0.4).tolist())"
    )
    result = child("-c", code)
    assert result.stdout.strip() == "False [[0.0]]", result.stderr


@once
def test_ahead_of_time_check_passes() -> None:
    result = child("-m", "ddit_kernels.aot", "--arch", "90", "--kernel", "evolution", "quantile", TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FLUX packed" in result.stdout and " 0 with problems" in result.stdout


@once
def test_ahead_of_time_check_refuses_the_interpreter() -> None:
    result = child("-m", "ddit_kernels.aot", TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr


@once
@pytest.mark.skipif(CUDA, reason="the kernels are tested in this very process")
def test_kernels_in_the_interpreter() -> None:
    result = child("-m", "pytest", "-q", str(HERE), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.mark.parametrize("_", [pytest.param(None, marks=gpu)])
@torch.no_grad()
def test_graph_replay(_: None) -> None:
    increments, weight, rows = inputs()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(increments, weight, rows, "triton")  # compiles and tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(increments, weight, rows, "triton")
    for _i in range(3):
        for increment in increments:
            increment.copy_(torch.randn_like(increment))
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip(captured, step(increments, weight, rows, "triton")):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("_", [pytest.param(None, marks=gpu)])
def test_decision_reaches_pinned_memory(_: None) -> None:
    increments = [torch.zeros(2, 16, 128, 128, device="cuda") for _i in range(3)]
    out, event = torch.full((2,), -1, dtype=torch.int32).pin_memory(), torch.cuda.Event()
    _decision, quantiles = ops.evolve_and_select(increments, (4, 8), 0.4, 1e-3, out=out, decided=event)
    event.synchronize()
    assert out.tolist() == [2, 2] and not quantiles.any()


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("size", [2, 4, 8])
@torch.no_grad()
def test_real_shapes(dtype: torch.dtype, size: int) -> None:
    """FLUX 1024 packed and Wan 480p, against the same computation in float64."""
    for shape, grid, width in (((1, 4096, 64), (64, 64), 3072), ((1, 16, 21, 60, 104), None, 1536)):
        latent = torch.randn(*shape, device="cuda", dtype=dtype)
        weight = (torch.randn(width, 16, size, size, device="cuda") / (4 * size)).to(dtype)
        rows = (torch.randn(size * size * 16, width, device="cuda") / width**0.5).to(dtype)
        exact = ops.patch_embed(latent.double(), weight.double(), None, size, packed=grid, backend="torch")
        plain = ops.patch_embed(latent, weight, None, size, packed=grid, backend="torch")
        tokens = ops.patch_embed(latent, weight, None, size, packed=grid, backend="triton")
        assert (tokens - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5
        cells = (128 // size, 128 // size) if grid else (21, -(-60 // size), -(-104 // size))
        options = dict(size=None if grid else (60, 104), packed=grid is not None)
        exact = ops.patch_deembed(tokens.double(), rows.double(), None, size, cells, **options, backend="torch")
        plain = ops.patch_deembed(tokens, rows, None, size, cells, **options, backend="torch")
        actual = ops.patch_deembed(tokens, rows, None, size, cells, **options, backend="triton")
        assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5
