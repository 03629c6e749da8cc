"""band_rest: reference and kernel against the band-split algebra in float64, edges, memories, levels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from ddit_kernels.band_rest import band_launch, band_rest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, EXAMPLES, assert_as_good, needs_kernels, strided
from torch import library

from ddit_rt import ops
from ddit_rt.granularity import Geometry, bands, line, pad_to_grid

BACKENDS = ["torch", pytest.param("triton", marks=needs_kernels)]


def algebra(latent: torch.Tensor, level: torch.Tensor, k: int, geometry: Geometry, memory: ops.BandMemory, model: Any):
    """Band-split as its path writes it, in float64; ``model`` stands for the transformer."""

    def of(value: torch.Tensor) -> torch.Tensor:
        return value.double().reshape(-1, 1, 1, 1, 1)

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return pad_to_grid(tensor.double(), geometry, k)

    low_latent, low_sigma = bands.low_state(wide(latent), of(level), k)
    low = bands.low_velocity(low_latent, low_sigma, model(low_latent), k)
    if memory.high == "probe":
        return bands.down(wide(memory.newest), k) - low

    def ahead(newest: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
        share = ((of(level) - of(memory.level_newest)) / (of(memory.level_newest) - of(memory.level_older))).clamp(
            max=1
        )
        return newest + share * (newest - older)

    if memory.residual is not None:
        last = memory.residual.double()
        low = low + (last if memory.residual_older is None else ahead(last, memory.residual_older.double()))
    if memory.high == "line":
        high = bands.high_band(ahead(wide(memory.newest), wide(memory.older)), k)
    else:
        noise = wide(latent)
        if memory.high == "clean":
            noise = noise - wide(memory.anchor) + of(memory.level_newest) * wide(memory.newest)
        high = bands.high_band(noise, k) / of(level)
    return bands.crop_to_latent(bands.up(low, k) + high, geometry)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, channels, frames = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    height, width, patch = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 2]))
    geometry = Geometry(channels, frames, height * patch, width * patch, patch)
    multiple = draw(st.sampled_from([2, 4]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape = (batch, channels, frames, geometry.height, geometry.width)
    low = (*shape[:3], *(side * patch for side in geometry.grid(multiple)))

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return strided(shape, draw(st.integers(0, 2)), generator).to(dtype).to(DEVICE)

    def level(value: float) -> torch.Tensor:
        kind = draw(st.sampled_from(["one", "each"]))
        values = torch.tensor(value, dtype=torch.float64) * torch.linspace(0.9, 1.0, batch, dtype=torch.float64)
        return (
            (values[0] if kind == "one" else values)
            .to(draw(st.sampled_from([torch.float32, torch.float64])))
            .to(DEVICE)
        )

    high = draw(st.sampled_from(["latent", "clean", "line", "probe"]))
    residuals = 0 if high == "probe" else draw(st.integers(0, 2))
    memory = ops.BandMemory(
        high,
        anchor=tensor(shape, dtype),
        newest=tensor(shape, dtype),
        older=tensor(shape, dtype),
        residual=tensor(low, torch.float32) if residuals else None,
        residual_older=tensor(low, torch.float32) if residuals > 1 else None,
        level_newest=level(0.7),
        level_older=level(0.8),
    )
    return dict(latent=tensor(shape, dtype), level=level(0.6), multiple=multiple, geometry=geometry, memory=memory)


def joined(given: ops.BandRest, model: Any, problem: dict[str, Any]) -> torch.Tensor:
    """gain·up(model(scale·down(latent))) + rest."""
    geometry, k = problem["geometry"], problem["multiple"]

    def of(value: torch.Tensor) -> torch.Tensor:
        return value.double().reshape(-1, 1, 1, 1, 1)

    means = bands.down(pad_to_grid(problem["latent"].double(), geometry, k), k)
    low = of(given.gain) * model(of(given.scale) * means)
    if problem["memory"].high == "probe":
        return low + given.rest
    return bands.crop_to_latent(bands.up(low, k), geometry) + given.rest


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES)
@given(problem=problems())
def test_the_rest_completes_the_algebra(backend: str, problem: dict[str, Any]) -> None:
    geometry, k = problem["geometry"], problem["multiple"]
    grid = tuple(side * geometry.patch for side in geometry.grid(k))

    def model(low: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * low)

    arguments = (problem["latent"], problem["level"], k)
    actual, plain = (
        ops.band_rest(*arguments, grid=grid, memory=problem["memory"], backend=one) for one in (backend, "torch")
    )
    assert actual.rest.dtype == torch.float32 and actual.rest.is_contiguous()
    assert actual.level.shape == (
        problem["level"].shape if problem["level"].dim() == 0 else problem["latent"].shape[:1]
    )
    exact = algebra(*arguments, geometry, problem["memory"], model)
    # float32 levels: a difference of two of them is divided by one of 0.1
    assert_as_good(joined(actual, model, problem), joined(plain, model, problem), exact, 2e-5)
    torch.testing.assert_close(actual.level.double(), plain.level.double(), rtol=1e-6, atol=0)


@needs_kernels
def test_operator_is_registered_as_it_behaves() -> None:
    latent, level = torch.randn(2, 3, 1, 6, 8, device=DEVICE), torch.tensor([0.5, 0.6], device=DEVICE)
    library.opcheck(band_rest, (latent, level, 2, [4, 4], "latent", *[None] * 7))
    library.opcheck(band_rest, (latent, level, 2, [4, 4], "probe", None, latent + 1, *[None] * 5))


@needs_kernels
def test_a_launch_overwrites_poisoned_memory() -> None:
    latent, level = torch.randn(3, 2, 1, 5, 7, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    rest, factors = torch.full_like(latent, torch.nan), torch.full((3, 3), torch.nan, device=DEVICE)
    band_launch(latent, level, 2, (3, 4), ops.BandMemory(), rest, factors).run(latent.device)
    assert rest.isfinite().all() and factors.isfinite().all()


Z = torch.randn(2, 3, 1, 6, 8)
SIGMA = torch.tensor(0.5)
WRONG = {
    "latent": ("expected a floating dtype", lambda: ops.band_rest(Z[0], SIGMA, 2)),
    "grid": ("does not cover", lambda: ops.band_rest(Z, SIGMA, 2, grid=(2, 4))),
    "high": ("high='low'", lambda: ops.band_rest(Z, SIGMA, 2, memory=ops.BandMemory("low"))),
    "missing": ("newest is missing", lambda: ops.band_rest(Z, SIGMA, 2, memory=ops.BandMemory("line"))),
    "no level": (
        "level_newest is missing",
        lambda: ops.band_rest(Z, SIGMA, 2, memory=ops.BandMemory("clean", anchor=Z, newest=Z)),
    ),
    "shape": ("newest has shape", lambda: ops.band_rest(Z, SIGMA, 2, memory=ops.BandMemory("probe", newest=Z[:1]))),
    "residual": ("residual has shape", lambda: ops.band_rest(Z, SIGMA, 2, memory=ops.BandMemory(residual=Z))),
    "level": ("level is", lambda: ops.band_rest(Z, torch.zeros(3), 2)),
    "multiple": ("multiple=0", lambda: ops.band_rest(Z, SIGMA, 0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_are_refused_by_name(name: str) -> None:
    message, call = WRONG[name]
    with pytest.raises(ops.OpArgumentError, match=message):
        call()


def test_nothing_of_a_memory_is_forgotten() -> None:
    """Every field of a memory changes the result where the high band or the residual asks for it."""
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.randn(Z.shape, generator=generator) for name in ("anchor", "newest", "older")}
    low = {name: torch.randn(2, 3, 1, 3, 4, generator=generator) for name in ("residual", "residual_older")}
    levels = {"level_newest": torch.tensor(0.7), "level_older": torch.tensor(0.95)}
    changed = set()
    for high in ("clean", "line"):
        memory = ops.BandMemory(high, **full, **low, **levels)
        wanted = ops.band_rest(Z, SIGMA, 2, memory=memory, backend="torch").rest
        for field in fields(memory)[1:]:
            other = replace(memory, **{field.name: getattr(memory, field.name) * 0.9})
            if not torch.equal(ops.band_rest(Z, SIGMA, 2, memory=other, backend="torch").rest, wanted):
                changed.add(field.name)
    assert changed == {field.name for field in fields(ops.BandMemory)} - {"high"}


def test_the_line_is_the_paths_own() -> None:
    older, newest = (torch.tensor(0.8), Z), (torch.tensor(0.7), Z.flip(0))
    memory = ops.BandMemory("line", newest=newest[1], older=older[1], level_newest=newest[0], level_older=older[0])
    rest = ops.band_rest(Z, SIGMA, 2, memory=memory, backend="torch").rest
    torch.testing.assert_close(bands.high_band(rest, 2), bands.high_band(line(older, newest, SIGMA), 2))
