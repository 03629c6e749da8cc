"""latent_evolution and select_multiple: reference and kernel against float64, ties, NaN, layouts, determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ddit_kernels.latent_evolution import WORKSPACE, evolution_launch, patch_counts
from ddit_kernels.patch_quantile import BLOCK, patch_std_quantile, quantile_rank, quantile_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, EXAMPLES, assert_as_good, evolution, needs_kernels, pack, strided, unpack

from ddit_rt import ops

BACKENDS = ["torch", pytest.param("triton", marks=needs_kernels)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[torch.Tensor], tuple[int, ...], float, tuple[int, int] | None]:
    """Increments (newest first), patch sizes, quantile, packed grid."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, channels, order = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    kind = draw(st.sampled_from(["image", "video", "packed"]))
    grid = (height, width) if kind == "packed" else None
    shape = {
        "image": (batch, channels, height, width),
        "video": (batch, channels, draw(st.integers(1, 3)), height, width),
        "packed": (batch, height * width, channels * 4),
    }[kind]
    dtype, layouts = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([(0, 0, 0), (1, 1, 1), (2, 2, 2), (0, 1, 2)]))
    offset = draw(st.sampled_from([0.0, 10.0]))
    increments = [
        (strided(shape, layouts[i], generator) * 10.0 ** draw(st.integers(-4, 0)) + offset).to(dtype)
        for i in range(order)
    ]
    sizes = draw(st.sampled_from([(2, 4, 8), (4, 8), (1, 2, 4), (8, 2), (4,), (1,)]))
    return [x.to(DEVICE) for x in increments], sizes, draw(st.floats(0, 1)), grid


def plain_layout(increments: list[torch.Tensor], grid: tuple[int, int] | None) -> list[torch.Tensor]:
    return increments if grid is None else [unpack(x, grid) for x in increments]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES)
@given(problem=problems())
def test_error_is_that_of_plain_pytorch(backend: str, problem) -> None:
    increments, sizes, quantile, grid = problem
    latents = plain_layout(increments, grid)
    actual = ops.latent_evolution(increments, sizes, quantile, packed=grid, backend=backend)
    assert actual.dtype == torch.float32
    exact = evolution(latents, sizes, quantile, torch.float64)
    plain = evolution(latents, sizes, quantile, torch.float32)
    scale = max(float(x.abs().max()) for x in increments)
    assert_as_good(actual, plain, exact, atol=3e-7 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES)
@given(problem=problems(), data=st.data())
def test_decision_agrees_with_quantiles_exactly(backend: str, problem, data: st.DataObject) -> None:
    increments, sizes, quantile, grid = problem
    quantiles = ops.latent_evolution(increments, sizes, quantile, packed=grid, backend=backend)
    value = np.float32(data.draw(st.sampled_from(quantiles.flatten().tolist())))
    threshold = float(
        data.draw(st.sampled_from([value, np.nextafter(value, np.float32(1e9)), np.float32(0), np.float32(np.inf)]))
    )
    chosen = ops.select_multiple(increments, sizes, quantile, threshold, packed=grid, backend=backend)
    expected = [
        max((size, i + 1) for i, size in enumerate((0, *sizes), start=-1) if i < 0 or row[i] < threshold)[1]
        for row in quantiles.cpu()
    ]
    assert chosen.dtype == torch.int32
    assert chosen.tolist() == expected
    again, both = ops.evolve_and_select(increments, sizes, quantile, threshold, packed=grid, backend=backend)
    assert torch.equal(again, chosen) and torch.equal(both, quantiles)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_constant_input(backend: str) -> None:
    tile = torch.randn(1, 3, 4, 4)
    tied = tile.repeat(1, 1, 4, 4).to(DEVICE)  # sixteen equal patches
    value = ops.latent_evolution([tied], (4,), 0.4, backend=backend)
    expected = float(tile.double().var(correction=0).sqrt())
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert ops.select_multiple([tied], (4,), 0.4, value.item(), backend=backend).item() == 0  # strictly below
    assert ops.select_multiple([tied], (4,), 0.4, value.item() * 1.001, backend=backend).item() == 1
    constant = torch.full((2, 3, 9, 7), 3.7, device=DEVICE)
    assert torch.equal(
        ops.latent_evolution([constant] * 3, (2, 4), 0.4, backend=backend), torch.zeros(2, 2, device=DEVICE)
    )
    assert ops.select_multiple([constant] * 3, (2, 4), 0.4, 1e-3, backend=backend).tolist() == [2, 2]
    assert ops.select_multiple([constant] * 3, (2, 4), 0.4, 0.0, backend=backend).tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", [0, 2])
def test_garbage_is_nan_and_finest_for_its_sample_only(backend: str, bad: float, where: int) -> None:
    increments = [torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    increments[where][1, 2, 11, 9] = bad  # 3e38 overflows when squared
    increments = [x.to(DEVICE) for x in increments]
    values = ops.latent_evolution(increments, (2, 4, 8), 0.4, backend=backend)
    assert values[0].isfinite().all() and values[1].isnan().all()
    assert ops.select_multiple(increments, (2, 4, 8), 0.4, math.inf, backend=backend).tolist() == [3, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_costs_no_precision(backend: str) -> None:
    latent = 10 + 0.05 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    latent = latent.to(DEVICE)
    exact = evolution([latent], (2, 4, 8), 0.4, torch.float64)
    actual = ops.latent_evolution([latent], (2, 4, 8), 0.4, backend=backend)
    assert float(((actual - exact) / exact).abs().max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_unpacked(backend: str) -> None:
    latents = [torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3)]
    packed = ops.latent_evolution([pack(x) for x in latents], (2, 4), 0.3, packed=(5, 3), backend=backend)
    torch.testing.assert_close(packed, ops.latent_evolution(latents, (2, 4), 0.3, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decision_into_given_memory(backend: str) -> None:
    latent = torch.zeros(2, 3, 8, 8, device=DEVICE)
    out = torch.full((2,), 77, dtype=torch.int32, device=DEVICE)
    assert ops.select_multiple([latent], (2, 4), 0.4, 1e-3, out=out, backend=backend) is out
    assert out.tolist() == [2, 2]


@needs_kernels
def test_launch_writes_everything_and_leaves_the_workspace_zero() -> None:
    increments = [torch.randn(2, 3, 11, 9, device=DEVICE) for _ in range(3)]
    counts = patch_counts(1, 11, 9, (2, 8))
    stds = torch.full((2, sum(counts)), math.nan, device=DEVICE)
    decision = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    workspace = torch.zeros(2 * WORKSPACE, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        evolution_launch(increments, (2, 8), 0.4, 0.5, None, stds, decision, workspace).run(stds.device)
        assert not workspace.any()
    assert stds.isfinite().all() and (decision >= 0).all()


@needs_kernels
def test_same_input_same_bits() -> None:
    increments = [torch.randn(1, 4, 16, 24, device=DEVICE) for _ in range(3)]
    results = [ops.evolve_and_select(increments, (2, 4), 0.4, 1.5, backend="triton") for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@needs_kernels
@pytest.mark.parametrize("sizes", [(3,), (1, 2, 4, 8, 16)])
def test_auto_falls_back_where_the_kernel_cannot(sizes: tuple[int, ...]) -> None:
    increments = [torch.randn(1, 4, 16, 16, device=DEVICE)]
    with pytest.raises(ops.BackendError, match="backend='triton'"):
        ops.latent_evolution(increments, sizes, 0.4, backend="triton")
    assert ops.latent_evolution(increments, sizes, 0.4).shape == (1, len(sizes))


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 1000, BLOCK + 5])
@pytest.mark.parametrize("quantile", [0.0, 0.4, 1.0])
def test_selection_is_exact(count: int, quantile: float) -> None:
    values = torch.rand(1, count, generator=torch.Generator().manual_seed(count)).mul(50).round().to(DEVICE)  # ties
    actual = patch_std_quantile(values, [count], [2], quantile)
    assert torch.equal(actual[:, 0].cpu(), quantile_reference(values.cpu(), quantile))


def test_quantile_beyond_what_torch_allows() -> None:
    count = 2**24 + 3
    values = torch.arange(count, dtype=torch.float32).flip(0)[None] / 2**20
    low, high, weight = quantile_rank(count, 0.3)
    assert (high, weight) == (low + 1, pytest.approx(0.3 * (count - 1) - low))
    assert quantile_reference(values, 0.3).item() == pytest.approx(0.3 * (count - 1) / 2**20, rel=1e-6)


@given(count=st.integers(1, 200), quantile=st.floats(0, 1), seed=st.integers(0, 99))
def test_quantile_is_torch_quantile(count: int, quantile: float, seed: int) -> None:
    values = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    torch.testing.assert_close(
        quantile_reference(values, quantile), torch.quantile(values.double(), quantile, dim=1).float()
    )


def test_reference_takes_a_long_video() -> None:
    increments = [torch.randn(1, 16, 21, 60, 104) for _ in range(3)]
    assert ops.latent_evolution(increments, (4, 8), 0.4, backend="torch").isfinite().all()


@pytest.mark.parametrize("sizes", [(3,), (2, 6, 3), (1, 2, 4, 8, 16)])
def test_reference_takes_any_sizes(sizes: tuple[int, ...]) -> None:
    increments = [torch.randn(2, 3, 13, 17) for _ in range(4)]
    exact = evolution(increments, sizes, 0.7, torch.float64)
    torch.testing.assert_close(ops.latent_evolution(increments, sizes, 0.7, backend="torch"), exact.float())
