"""adapter_features and adapter_velocity: kernels as exact as their references, which are held to the path elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddit_kernels.adapter_features import adapter_features
from ddit_kernels.adapter_velocity import adapter_velocity
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, EXAMPLES, assert_as_good, needs_kernels, strided, vector
from torch import library

from ddit_rt import ops
from ddit_rt.granularity import Geometry

ATOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, channels, frames = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    height, width, patch = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 2]))
    multiple, dtype = draw(st.sampled_from([2, 4])), draw(st.sampled_from(list(ATOL)))
    geometry = Geometry(channels, frames, height * patch, width * patch, patch)
    rows, columns = geometry.grid(multiple)
    side, known = multiple * patch, draw(st.integers(0, 2))
    shape = (batch, channels, frames, geometry.height, geometry.width)

    def tensor(*shape: int) -> torch.Tensor:
        return strided(shape, draw(st.integers(0, 2)), generator).to(dtype).to(DEVICE)

    def level(value: float) -> torch.Tensor:
        each = torch.linspace(0.9, 1.0, batch, dtype=torch.float64) * value
        return (each if draw(st.booleans()) else each[0]).to(DEVICE)

    memory = ops.BandMemory(
        anchor=tensor(*shape) if known else None,
        newest=tensor(*shape) if known else None,
        older=tensor(*shape) if known > 1 else None,
        level_newest=level(0.7) if known else None,
        level_older=level(0.8) if known > 1 else None,
    )
    return dict(
        latent=tensor(*shape),
        level=level(0.6),
        multiple=multiple,
        grid=(rows * side, columns * side),
        side=side,
        memory=memory,
        reads=draw(st.booleans()),
        decoded=tensor(batch, 2 * channels, frames, rows * side, columns * side),
        residual=torch.randn(batch, frames * rows * columns, channels * side**2, generator=generator)
        .to(dtype)
        .to(DEVICE),
        trust=vector(torch.randn(channels, generator=generator).to(dtype).to(DEVICE), draw(st.integers(0, 2))),
        dtype=dtype,
    )


def computed(problem: dict[str, Any], backend: str, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    def cast(value: Any) -> Any:
        return value.double() if exact and isinstance(value, torch.Tensor) else value

    memory = ops.BandMemory(**{name: cast(value) for name, value in vars(problem["memory"]).items()})
    step = (cast(problem["latent"]), problem["level"], problem["multiple"])
    given = ops.adapter_features(*step, problem["grid"], memory, problem["reads"], backend=backend)
    velocity = ops.adapter_velocity(
        *step,
        cast(problem["decoded"]),
        cast(problem["residual"]),
        problem["side"],
        memory,
        given.factors,
        trust=cast(problem["trust"]) if problem["reads"] else None,
        trust_speed=20.0,
        backend=backend,
    )
    return given.features, velocity


@needs_kernels
@settings(max_examples=EXAMPLES)
@given(problem=problems())
def test_kernels_are_as_exact_as_pytorch(problem: dict[str, Any]) -> None:
    exact, plain, actual = computed(problem, "torch", True), computed(problem, "torch"), computed(problem, "triton")
    assert actual[0].dtype == problem["dtype"] and actual[1].dtype == torch.float32
    # references compute in float32, of which the trust of 20 times a difference is the largest part
    for one, other, wanted, atol in zip(actual, plain, exact, (ATOL[problem["dtype"]], 1e-3), strict=True):
        assert_as_good(one, other, wanted.double(), atol)


@needs_kernels
@pytest.mark.parametrize("layout", [1, 2])
def test_trust_and_factors_may_lie_anyhow_in_memory(layout: int) -> None:
    latent, level = torch.randn(2, 3, 1, 4, 4, device=DEVICE), torch.tensor([0.5, 0.6], device=DEVICE)
    memory = ops.BandMemory(anchor=latent + 1, newest=latent - 1, level_newest=level + 0.1)
    decoded, residual = torch.randn(2, 6, 1, 4, 4, device=DEVICE), torch.randn(2, 1, 48, device=DEVICE)
    trust = vector(torch.rand(3, device=DEVICE) + 0.5, layout)
    factors = torch.rand(2, 4, device=DEVICE).T
    given = (latent, level, 2, decoded, residual, 4, memory, factors)
    found, wanted = (ops.adapter_velocity(*given, trust=trust, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    latent, level = torch.randn(2, 3, 1, 6, 8, device=DEVICE), torch.tensor([0.5, 0.6], device=DEVICE)
    near, far, apart = level + 0.1, level + 0.2, torch.rand(2, device=DEVICE)
    known = (latent + 1, latent - 1, near, far, apart)
    library.opcheck(adapter_features, (latent, level, 2, [8, 8], True, *known))
    decoded, factors = torch.randn(2, 6, 1, 8, 8, device=DEVICE), torch.rand(4, 2, device=DEVICE)
    residual, trust = torch.randn(2, 4, 48, device=DEVICE), torch.rand(3, device=DEVICE)
    given = (decoded, residual, trust, 20.0, latent, latent + 1, latent - 1, near, far, factors)
    library.opcheck(adapter_velocity, (latent, level, 2, 4, *given))


Z = torch.randn(1, 2, 1, 6, 8)
WRONG = {
    "grid": (r"grid=\(7, 8\)", (7, 8), ops.BandMemory()),
    "newest": ("newest is missing", (8, 8), ops.BandMemory(older=Z, level_older=torch.tensor(0.8))),
    "level": ("level_newest is missing", (8, 8), ops.BandMemory(newest=Z)),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_are_refused_by_name(name: str) -> None:
    message, grid, memory = WRONG[name]
    with pytest.raises(ops.OpArgumentError, match=message):
        ops.adapter_features(Z, torch.tensor(0.5), 2, grid, memory, True)
