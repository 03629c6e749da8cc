"""patch_embed and patch_deembed: reference and kernel against float64, layouts, edges, poisoned memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ddit_kernels.patch_deembed import deembed_launch, depth_parts
from ddit_kernels.patch_embed import embed_launch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, EXAMPLES, assert_as_good, deembed, embed, needs_kernels, pack, strided, unpack, vector

from ddit_rt import ops

BACKENDS = ["torch", pytest.param("triton", marks=needs_kernels)]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def scales(draw: st.DrawFn, batch: int) -> float | torch.Tensor:
    kind = draw(st.sampled_from(["none", "number", "one", "each"]))
    if kind in ("none", "number"):
        return 1.0 if kind == "none" else 0.37
    return vector(torch.linspace(0.5, 1.5, 1 if kind == "one" else batch).to(DEVICE), draw(st.integers(0, 2)))


@st.composite
def embeddings(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, channels, features = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    height, width, frames = draw(st.integers(1, 11)), draw(st.integers(1, 11)), draw(st.integers(1, 2))
    size, mean_over, dtype = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(DTYPES)
    kind, layout = draw(st.sampled_from(["image", "video", "packed"])), draw(st.integers(0, 2))
    shape = {
        "image": (batch, channels, height, width),
        "video": (batch, channels, frames, height, width),
        "packed": (batch, height * width, channels * 4),
    }[kind]
    grid = (height, width) if kind == "packed" else None
    latent = strided(shape, layout, generator).to(draw(st.sampled_from([dtype, torch.float32]))).to(DEVICE)
    plain = latent if grid is None else unpack(latent, grid)
    side = size * mean_over
    count = (frames if kind == "video" else 1) * -(-plain.shape[-2] // side) * -(-plain.shape[-1] // side)

    def optional(*shape: int) -> torch.Tensor | None:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE) if draw(st.booleans()) else None

    def optional_vector() -> torch.Tensor | None:
        found = optional(features)
        return None if found is None else vector(found, draw(st.integers(0, 2)))

    weight = torch.randn(features, channels, *[1] * (kind == "video"), size, size, generator=generator)
    position = draw(st.sampled_from([(features,), (count, features), (batch, 1, features), (batch, count, features)]))
    return dict(
        latent=latent,
        plain=plain,
        weight=(weight / math.sqrt(weight[0].numel())).to(dtype).to(DEVICE),
        bias=optional_vector(),
        size=size,
        extra=optional(*position),
        size_embedding=optional_vector(),
        mean_over=mean_over,
        scale=scales(draw, batch),
        packed=grid,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES)
@given(problem=embeddings())
def test_embed_error_is_that_of_plain_pytorch(backend: str, problem: dict[str, Any]) -> None:
    case = dict(problem)
    plain, grid, size = case.pop("plain"), case.pop("packed"), case.pop("size")
    latent, weight, bias = case.pop("latent"), case.pop("weight"), case.pop("bias")
    actual = ops.patch_embed(latent, weight, bias, size, packed=grid, backend=backend, **case)
    reference = ops.patch_embed(latent, weight, bias, size, packed=grid, backend="torch", **case)
    assert actual.dtype == weight.dtype and actual.is_contiguous()
    exact = embed(plain, weight, bias, size, dtype=torch.float64, **case)
    atol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[weight.dtype]
    assert_as_good(actual, reference, exact, atol)


@st.composite
def projections(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, channels, depth = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.sampled_from([7, 40, 520]))
    height, width, frames = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    size, spread, dtype = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(DTYPES)
    packed = draw(st.booleans()) and size * spread > 1
    grid = (height, width) if packed or draw(st.booleans()) else (frames, height, width)
    full = (height * size * spread, width * size * spread)
    step = 2 if packed else 1
    crop = tuple(draw(st.integers(1, n // step)) * step for n in full) if draw(st.booleans()) else None
    layout = draw(st.integers(0, 2))
    residual = None
    if draw(st.booleans()):
        shape = (batch, channels, *grid[:-2], *(crop or full))
        if packed:
            shape = (batch, shape[-2] // 2 * (shape[-1] // 2), channels * 4)
        residual = strided(shape, layout, generator).to(draw(st.sampled_from([dtype, torch.float32]))).to(DEVICE)
    bias = torch.randn(size * size * channels, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(size * size * channels, depth, generator=generator) / math.sqrt(depth)
    return dict(
        tokens=strided((batch, math.prod(grid), depth), layout, generator).to(dtype).to(DEVICE),
        weight=weight.to(dtype).to(DEVICE),
        bias=vector(bias, draw(st.integers(0, 2))) if draw(st.booleans()) else None,
        size=size,
        grid=grid,
        residual=residual,
        scale=scales(draw, batch),
        spread_over=spread,
        crop=crop,
        packed=packed,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES)
@given(problem=projections())
def test_deembed_error_is_that_of_plain_pytorch(backend: str, problem: dict[str, Any]) -> None:
    case = dict(problem)
    size, crop, packed = case.pop("size"), case.pop("crop"), case.pop("packed")
    options = dict(case, patch_size=size, size=crop, packed=packed)
    actual = ops.patch_deembed(**options, backend=backend)
    reference = ops.patch_deembed(**options, backend="torch")
    assert actual.dtype == reference.dtype and actual.is_contiguous()
    residual = case.pop("residual")
    exact = deembed(**case, size=size, crop=crop, residual=None, dtype=torch.float64)
    exact = pack(exact) if packed else exact
    exact = exact if residual is None else exact + residual.double()
    atol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case["weight"].dtype]
    assert_as_good(actual, reference, exact, atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_identity_weights_round_trip(backend: str, size: int) -> None:
    latent = torch.randn(2, 3, 2, 8, 4, device=DEVICE)
    features = 3 * size * size
    eye = torch.eye(features, device=DEVICE)
    tokens = ops.patch_embed(latent, eye.view(features, 3, size, size), None, size, backend=backend)
    rows = eye.view(3, size, size, features).permute(1, 2, 0, 3).reshape(features, features)
    back = ops.patch_deembed(tokens, rows, None, size, (2, 8 // size, 4 // size), backend=backend)
    torch.testing.assert_close(back, latent, rtol=1e-6, atol=1e-6)


def test_reference_is_the_convolution() -> None:
    latent, weight, bias = torch.randn(2, 4, 8, 6), torch.randn(12, 4, 2, 2), torch.randn(12)
    expected = torch.nn.functional.conv2d(latent, weight, bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ops.patch_embed(latent, weight, bias, 2, backend="torch"), expected)


@needs_kernels
@pytest.mark.parametrize("layout", [1, 2])
def test_vectors_may_lie_anyhow_in_memory(layout: int) -> None:
    latent, weight = torch.randn(3, 2, 4, 4, device=DEVICE), torch.randn(8, 2, 2, 2, device=DEVICE)
    bias, size_embedding, scale = (vector(torch.rand(n, device=DEVICE) + 0.5, layout) for n in (8, 8, 3))
    given = {"size_embedding": size_embedding, "scale": scale}
    tokens, wanted = (ops.patch_embed(latent, weight, bias, 2, **given, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(tokens, wanted, rtol=1e-5, atol=1e-5)
    rows = torch.randn(8, 8, device=DEVICE)
    back, wanted = (
        ops.patch_deembed(tokens, rows, bias, 2, (2, 2), scale=scale, backend=b) for b in ("triton", "torch")
    )
    torch.testing.assert_close(back, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_stays_exact_in_half_precision(backend: str) -> None:
    latent = torch.full((1, 1, 2, 2), 1.0, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.eye(4, device=DEVICE).view(4, 1, 2, 2)
    scale = torch.tensor(1.0 + 2.0**-12, device=DEVICE)  # bfloat16 would round it to 1
    tokens = ops.patch_embed(latent, weight, None, 2, scale=scale, backend=backend)
    torch.testing.assert_close(tokens, torch.full_like(tokens, float(scale)), rtol=1e-6, atol=0)


@needs_kernels
def test_launches_overwrite_poisoned_memory() -> None:
    latent, weight = torch.randn(1, 3, 7, 10, device=DEVICE), torch.randn(9, 3, 2, 2, device=DEVICE)
    tokens = torch.full((1, 20, 9), math.nan, device=DEVICE)
    embed_launch(latent, weight, None, 2, None, None, 1, 1.0, None, None, tokens).run(tokens.device)
    assert tokens.isfinite().all()
    out, weight = torch.full((1, 3, 7, 10), math.nan, device=DEVICE), torch.randn(2, 2, 3, 9, device=DEVICE)
    deembed_launch(tokens, weight, None, 2, (4, 5), None, 1.0, None, 1, None, out).run(out.device)
    assert out.isfinite().all()


@needs_kernels
def test_shared_depth_gives_the_same_bits_every_time() -> None:
    assert depth_parts(4, 4, 1024) > 1 and depth_parts(100_000, 64, 1536) == 1
    tokens, weight = torch.randn(1, 4, 1024, device=DEVICE), torch.randn(4, 1024, device=DEVICE)
    results = [ops.patch_deembed(tokens, weight, None, 2, (2, 2), backend="triton") for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernels
@pytest.mark.parametrize("what", ["size 3", "gradient", "float64"])
def test_auto_falls_back_where_the_kernel_cannot(what: str) -> None:
    size = 3 if what == "size 3" else 2
    dtype = torch.float64 if what == "float64" else torch.float32
    latent = torch.randn(1, 2, 6, 6, device=DEVICE, dtype=dtype)
    weight = torch.randn(4, 2, size, size, device=DEVICE, dtype=dtype, requires_grad=what == "gradient")
    with pytest.raises(ops.BackendError, match="cannot run here"):
        ops.patch_embed(latent, weight, None, size, backend="triton")
    tokens = ops.patch_embed(latent, weight, None, size)
    assert tokens.requires_grad == (what == "gradient")


@settings(max_examples=10)
@given(problem=embeddings())
def test_reference_has_gradients(problem: dict[str, Any]) -> None:
    latent, weight = problem["latent"].float(), problem["weight"].float().requires_grad_()
    ops.patch_embed(latent, weight, None, problem["size"], packed=problem["packed"]).square().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
