"""What ``gpu_suite.py`` measures: shapes of FLUX and Wan, and for each who computes the same thing how."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ddit_rt import ops

Call = Callable[[], Any]
Shape = tuple[int, ...]

LATENTS: dict[str, tuple[Shape, int]] = {  # latent (B, C, [F,] H, W), width of the transformer
    "FLUX 512": ((1, 16, 64, 64), 3072),
    "FLUX 1024": ((1, 16, 128, 128), 3072),
    "FLUX 2048": ((1, 16, 256, 256), 3072),
    "Wan 480p x 81": ((1, 16, 21, 60, 104), 1536),
    "Wan 720p x 81": ((1, 16, 21, 90, 160), 5120),
}
TINY: dict[str, tuple[Shape, int]] = {"tiny": ((1, 4, 16, 16), 32), "tiny video": ((1, 4, 2, 12, 16), 32)}
COMPILED = ("FLUX 1024", "Wan 480p x 81", "tiny")  # torch.compile takes seconds per case
FORMS = ((2, 1), (4, 1), (8, 1), (2, 2), (2, 4))  # patch size, and k of the band-split form


@dataclass(frozen=True)
class Case:
    """What is computed, how much work that is, and who computes it: provider -> (inputs -> call)."""

    kernel: str
    name: str
    bytes: int
    flop: int
    inputs: Callable[[], dict[str, Any]]
    providers: dict[str, Callable[[dict[str, Any]], Call]]


@dataclass(frozen=True)
class Where:
    """Where tensors live, and who stands for the kernels and for the compiler (in a dry run, cheap substitutes)."""

    device: str
    dtype: torch.dtype
    kernel: str
    compiler: str  # of torch.compile

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def stored(shape: Shape) -> tuple[Shape, tuple[int, int] | None]:
    """Images as FLUX keeps them, packed into tokens of 2 x 2 pixels, with their grid; videos as they are."""
    if len(shape) == 5:
        return shape, None
    batch, channels, height, width = shape
    return (batch, height // 2 * (width // 2), channels * 4), (height // 2, width // 2)


def decision(where: Where, name: str, shape: Shape, sizes: tuple[int, ...]) -> Case:
    """select_multiple of three float32 increments, alone and with the quantile values."""
    kept, packed = stored(shape)
    arguments = (sizes, 0.4, 1e-3)
    compiled = torch.compile(ops.select_multiple, fullgraph=True, dynamic=False, backend=where.compiler)

    def provider(function: Callable[..., Any], backend: str) -> Callable[[dict[str, Any]], Call]:
        return lambda x: lambda: function(x["increments"], *arguments, packed=packed, backend=backend)

    providers = {
        "kernel": provider(ops.select_multiple, where.kernel),
        "kernel + quantiles": provider(ops.evolve_and_select, where.kernel),
        "eager": provider(ops.select_multiple, "torch"),
    }
    if name in COMPILED and sizes == (4, 8):
        providers["compile"] = provider(compiled, "torch")
    return Case(
        "decision",
        f"{name}, sizes {','.join(map(str, sizes))}",
        3 * 4 * math.prod(shape),
        0,
        lambda: {"increments": [torch.randn(kept, device=where.device) for _ in range(3)]},
        providers,
    )


def embed(where: Where, name: str, shape: Shape, width: int, size: int, mean: int) -> Case:
    """patch_embed, against the same through PyTorch and against the bare product on patches already made."""
    kept, packed = stored(shape)
    depth, side = shape[1] * size * size, size * mean
    count = math.prod(shape[2:-2]) * -(-shape[-2] // side) * -(-shape[-1] // side)
    compiled = torch.compile(ops.patch_embed, fullgraph=True, dynamic=False, backend=where.compiler)

    def provider(function: Callable[..., Any], backend: str) -> Callable[[dict[str, Any]], Call]:
        return lambda x: (
            lambda: function(x["latent"], x["weight"], x["bias"], size, mean_over=mean, packed=packed, backend=backend)
        )

    def linear(x: dict[str, Any]) -> Call:
        weight = x["weight"].flatten(1)
        return lambda: F.linear(x["patches"], weight, x["bias"])

    providers = {
        "kernel": provider(ops.patch_embed, where.kernel),
        "F.linear only": linear,
        "rearrange + F.linear": provider(ops.patch_embed, "torch"),
    }
    if name in COMPILED and mean == 1:
        providers["compile"] = provider(compiled, "torch")
    return Case(
        "embed",
        f"{name}, s={size}, k={mean}, d={width}",
        (math.prod(shape) + width * depth + count * width) * where.dtype.itemsize,
        2 * count * depth * width,
        lambda: dict(
            latent=where.random(*kept),
            weight=where.random(width, shape[1], size, size),
            bias=where.random(width),
            patches=where.random(1, count, depth),
        ),
        providers,
    )


def deembed(where: Where, name: str, shape: Shape, width: int, size: int, spread: int) -> Case:
    """patch_deembed with a residual, against the same through PyTorch and against the bare product."""
    kept, packed = stored(shape)
    side, features = size * spread, shape[1] * size * size
    grid = (*shape[2:-2], -(-shape[-2] // side), -(-shape[-1] // side))
    count = math.prod(grid)
    options = dict(patch_size=size, grid=grid, spread_over=spread, size=shape[-2:], packed=packed is not None)
    compiled = torch.compile(ops.patch_deembed, fullgraph=True, dynamic=False, backend=where.compiler)

    def provider(function: Callable[..., Any], backend: str) -> Callable[[dict[str, Any]], Call]:
        return lambda x: lambda: function(**x, **options, backend=backend)

    providers = {
        "kernel": provider(ops.patch_deembed, where.kernel),
        "F.linear only": lambda x: lambda: F.linear(x["tokens"], x["weight"], x["bias"]),
        "F.linear + rearrange": provider(ops.patch_deembed, "torch"),
    }
    if name in COMPILED and spread == 1:
        providers["compile"] = provider(compiled, "torch")
    return Case(
        "deembed",
        f"{name}, s={size}, k={spread}, d={width}",
        (count * width + width * features + 2 * math.prod(shape)) * where.dtype.itemsize,
        2 * count * features * width,
        lambda: dict(
            tokens=where.random(1, count, width),
            weight=where.random(features, width),
            bias=where.random(features),
            residual=where.random(*kept),
        ),
        providers,
    )


def cases(cuda: bool) -> list[Case]:
    """All cases, what the project's targets need first; without CUDA the dry run's."""
    where = (
        Where("cuda", torch.bfloat16, "triton", "inductor") if cuda else Where("cpu", torch.float32, "torch", "eager")
    )
    found = []
    for name, (shape, width) in (LATENTS if cuda else TINY).items():
        found += [decision(where, name, shape, sizes) for sizes in ((4, 8), (2, 4, 8))]
        for make, (size, k) in itertools.product((embed, deembed), FORMS):
            found.append(make(where, name, shape, width, size, k))
    return sorted(found, key=lambda case: not case.name.startswith(COMPILED))
