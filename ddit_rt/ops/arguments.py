"""What the operations of :mod:`ddit_rt.ops` accept; every refusal names the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from ddit_kernels.band_rest import BandMemory

from ..errors import DDiTError


class OpArgumentError(DDiTError, ValueError):
    """An argument of an operation has the wrong shape, dtype or range; the message names the value and the fix."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OpArgumentError(message)


def _check_packed(tokens: torch.Tensor, packed: tuple[int, int], name: str) -> None:
    _require(
        len(packed) == 2
        and tokens.dim() == 3
        and tokens.shape[1] == packed[0] * packed[1]
        and tokens.shape[2] % 4 == 0,
        f"{name} has shape {tuple(tokens.shape)} with packed={tuple(packed)}: packed tokens are (B, h*w, C*4) for the "
        "token grid packed=(h, w).",
    )


def check_evolution(
    increments: Sequence[torch.Tensor], patch_sizes: Sequence[int], quantile: float, packed: tuple[int, int] | None
) -> None:
    """Arguments of :func:`ddit_rt.ops.latent_evolution`."""
    _require(
        not isinstance(increments, torch.Tensor) and len(increments) > 0,
        "increments must be a non-empty list or tuple of tensors, newest first; "
        "wrap a single increment as [increment].",
    )
    first = increments[0]
    for i, increment in enumerate(increments):
        _require(
            increment.is_floating_point(),
            f"increments[{i}] has dtype {increment.dtype}: pass a floating dtype, best float32 taken before rounding.",
        )
        _require(
            increment.shape == first.shape and increment.device == first.device,
            f"increments[{i}] is {tuple(increment.shape)} on {increment.device}, increments[0] is {tuple(first.shape)} "
            f"on {first.device}: all increments come from one latent; reset the history when its shape changes.",
        )
    if packed is not None:
        _check_packed(first, packed, "increments[0]")
    else:
        _require(
            first.dim() in (4, 5),
            f"increments[0] has shape {tuple(first.shape)}: expected (B, C, H, W) or (B, C, F, H, W), "
            "or packed tokens with packed=(h, w).",
        )
    _require(all(n > 0 for n in first.shape[1:]), f"increments[0] has an empty axis: {tuple(first.shape)}.")
    _require(
        len(patch_sizes) > 0
        and len(set(patch_sizes)) == len(patch_sizes)
        and all(isinstance(s, int) and s > 0 for s in patch_sizes),
        f"patch_sizes={list(patch_sizes)}: give distinct positive integers, in latent pixels.",
    )
    _require(0.0 <= quantile <= 1.0, f"quantile={quantile}: give a number from 0 to 1.")


def check_decision(threshold: float, out: torch.Tensor | None, increment: torch.Tensor) -> None:
    """Further arguments of :func:`ddit_rt.ops.select_multiple`."""
    _require(threshold >= 0.0, f"threshold={threshold}: give a number >= 0; 0 never coarsens.")
    if out is not None:
        _require(
            out.dtype == torch.int32 and out.shape == increment.shape[:1] and out.is_contiguous(),
            f"out is {out.dtype} {tuple(out.shape)}: give a contiguous int32 tensor of shape ({increment.shape[0]},).",
        )
        _require(
            out.device == increment.device or (increment.is_cuda and out.is_pinned()),
            f"out is on {out.device}, the increments on {increment.device}: use that device or pinned host memory.",
        )


def check_embed(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    extra: torch.Tensor | None,
    size_embedding: torch.Tensor | None,
    mean_over: int,
    scale: float | torch.Tensor,
    packed: tuple[int, int] | None,
) -> None:
    """Arguments of :func:`ddit_rt.ops.patch_embed`."""
    _positive(patch_size=patch_size, mean_over=mean_over)
    if packed is not None:
        _check_packed(latent, packed, "latent")
        channels, frames, height, width = latent.shape[2] // 4, 1, 2 * packed[0], 2 * packed[1]
    else:
        _require(
            latent.dim() in (4, 5),
            f"latent has shape {tuple(latent.shape)}: expected (B, C, H, W) or (B, C, F, H, W), "
            "or packed tokens with packed=(h, w).",
        )
        channels, (height, width) = latent.shape[1], latent.shape[-2:]
        frames = latent.shape[2] if latent.dim() == 5 else 1
    _require(latent.is_floating_point(), f"latent has dtype {latent.dtype}: pass a floating dtype.")
    _require(all(n > 0 for n in latent.shape[1:]), f"latent has an empty axis: {tuple(latent.shape)}.")
    kernel = tuple(weight.shape[1:])
    _require(
        kernel in ((channels, patch_size, patch_size), (channels, 1, patch_size, patch_size)),
        f"weight has shape {tuple(weight.shape)}: for {channels} channels and patch_size={patch_size} expected "
        f"(d, {channels}, {patch_size}, {patch_size}).",
    )
    width_out = weight.shape[0]
    for name, vector in (("bias", bias), ("size_embedding", size_embedding)):
        _require(
            vector is None or vector.shape == (width_out,),
            f"{name} has shape {None if vector is None else tuple(vector.shape)}: expected ({width_out},).",
        )
    side = patch_size * mean_over
    shape = (latent.shape[0], frames * -(-height // side) * -(-width // side), width_out)
    _check_broadcast(extra, shape, "extra")
    _check_scale(scale, latent.shape[0])
    factor = scale if isinstance(scale, torch.Tensor) else None
    _check_device(latent, weight=weight, bias=bias, extra=extra, size_embedding=size_embedding, scale=factor)


def check_deembed(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    grid: Sequence[int],
    residual: torch.Tensor | None,
    scale: float | torch.Tensor,
    spread_over: int,
    size: tuple[int, int] | None,
    packed: bool,
) -> tuple[int, int]:
    """Arguments of :func:`ddit_rt.ops.patch_deembed`; returns (H, W) of the latent to write."""
    _positive(patch_size=patch_size, spread_over=spread_over)
    _require(
        len(grid) in (2, 3) and all(n > 0 for n in grid) and tokens.dim() == 3 and tokens.shape[1] == math.prod(grid),
        f"tokens have shape {tuple(tokens.shape)}, grid={tuple(grid)}: expected (B, N, d) with N the product of a grid "
        "(h, w) or (f, h, w).",
    )
    _require(tokens.is_floating_point(), f"tokens have dtype {tokens.dtype}: pass a floating dtype.")
    pixels = (patch_size, patch_size)
    _require(
        weight.shape[-1] == tokens.shape[2]
        and (weight.shape[:2] == pixels if weight.dim() == 4 else weight.dim() == 2)
        and weight[..., 0].numel() % patch_size**2 == 0,
        f"weight has shape {tuple(weight.shape)}: for patch_size={patch_size} expected "
        f"({patch_size**2}*C, {tokens.shape[2]}) or ({patch_size}, {patch_size}, C, {tokens.shape[2]}).",
    )
    _require(
        bias is None or bias.shape == weight.shape[:-1],
        f"bias has shape {None if bias is None else tuple(bias.shape)}: expected {tuple(weight.shape[:-1])}.",
    )
    full = (grid[-2] * patch_size * spread_over, grid[-1] * patch_size * spread_over)
    height, width = full if size is None else size
    _require(
        0 < height <= full[0] and 0 < width <= full[1],
        f"size=({height}, {width}) does not fit in the {full} pixels that grid={tuple(grid)} covers.",
    )
    _require(
        not packed or (len(grid) == 2 and height % 2 == 0 and width % 2 == 0),
        f"packed output needs a grid (h, w) and an even size; got grid={tuple(grid)}, size=({height}, {width}).",
    )
    channels, batch = weight[..., 0].numel() // patch_size**2, tokens.shape[0]
    shape = (batch, channels, *grid[:-2], height, width)
    if packed:
        shape = (batch, (height // 2) * (width // 2), channels * 4)
    _require(
        residual is None or tuple(residual.shape) == shape,
        f"residual has shape {None if residual is None else tuple(residual.shape)}: expected {shape}.",
    )
    _check_scale(scale, batch)
    factor = scale if isinstance(scale, torch.Tensor) else None
    _check_device(tokens, weight=weight, bias=bias, residual=residual, scale=factor)
    return height, width


def check_adapter(
    latent: torch.Tensor, level: torch.Tensor, multiple: int, grid: tuple[int, int], memory: BandMemory
) -> None:
    """Arguments of :func:`ddit_rt.ops.adapter_features` and :func:`ddit_rt.ops.adapter_velocity`."""
    _positive(multiple=multiple)
    _require(
        all(size % multiple == 0 for size in grid),
        f"grid={tuple(grid)}: {multiple} has to divide it; extend it at the bottom and right.",
    )
    blocks = (grid[0] // multiple, grid[1] // multiple)
    check_band(latent, level, multiple, blocks, replace(memory, high="latent"))
    _require(
        memory.older is None or memory.newest is not None,
        "newest is missing: an older prediction has a newer one.",
    )
    for name in ("newest", "older"):
        given = (getattr(memory, name), getattr(memory, f"level_{name}"))
        _require(given[0] is None or given[1] is not None, f"level_{name} is missing beside {name}.")


def check_band(
    latent: torch.Tensor, level: torch.Tensor, multiple: int, grid: tuple[int, int] | None, memory: BandMemory
) -> tuple[int, int]:
    """Arguments of :func:`ddit_rt.ops.band_rest`; returns (rows, columns) of blocks."""
    _positive(multiple=multiple)
    _require(
        latent.dim() == 5 and latent.is_floating_point() and all(n > 0 for n in latent.shape[1:]),
        f"latent is {latent.dtype} of shape {tuple(latent.shape)}: expected a floating dtype and (B, C, F, H, W).",
    )
    least = (-(-latent.shape[3] // multiple), -(-latent.shape[4] // multiple))
    rows, columns = least if grid is None else grid
    _require(
        rows >= least[0] and columns >= least[1],
        f"grid=({rows}, {columns}) does not cover the latent: it has {least} blocks of {multiple} x {multiple}.",
    )
    needed = {"latent": (), "clean": ("anchor", "newest"), "line": ("newest", "older"), "probe": ("newest",)}
    _require(memory.high in needed, f"high={memory.high!r}: use one of {', '.join(map(repr, needed))}.")
    levels = {"clean": ("level_newest",), "line": ("level_newest", "level_older")}.get(memory.high, ())
    if memory.residual_older is not None:
        levels = ("level_newest", "level_older", "residual")
    for name in (*needed[memory.high], *levels):
        _require(getattr(memory, name) is not None, f"{name} is missing: high={memory.high!r} needs it.")
    low = (*latent.shape[:3], rows, columns)
    shapes = {name: latent.shape for name in ("anchor", "newest", "older")}
    for name, shape in (shapes | {name: low for name in ("residual", "residual_older")}).items():
        tensor = getattr(memory, name)
        _require(
            tensor is None or tensor.shape == shape,
            f"{name} has shape {None if tensor is None else tuple(tensor.shape)}: expected {tuple(shape)}.",
        )
        _check_device(latent, **{name: tensor})
    for name, value in (("level", level), ("level_newest", memory.level_newest), ("level_older", memory.level_older)):
        if value is not None:
            _require(
                value.is_floating_point() and value.numel() in (1, latent.shape[0]),
                f"{name} is {value.dtype} of shape {tuple(value.shape)}: a floating tensor, one value or one a sample.",
            )
            _check_device(latent, **{name: value})
    return rows, columns


def _check_scale(scale: float | torch.Tensor, batch: int) -> None:
    if isinstance(scale, torch.Tensor):
        _require(
            scale.numel() in (1, batch) and scale.dim() <= 1,
            f"scale has shape {tuple(scale.shape)}: give a number, a one-element tensor or one value per sample.",
        )
    else:
        _require(math.isfinite(scale), f"scale={scale}: give a finite number.")


def _positive(**values: int) -> None:
    for name, value in values.items():
        _require(isinstance(value, int) and value > 0, f"{name}={value!r}: give a positive integer.")


def _check_broadcast(tensor: torch.Tensor | None, shape: tuple[int, ...], name: str) -> None:
    if tensor is None:
        return
    fits = tensor.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(tensor.shape), reversed(shape), strict=False)
    )
    _require(fits, f"{name} has shape {tuple(tensor.shape)}: it must broadcast to {shape}.")


def _check_device(first: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        _require(
            tensor is None or tensor.device == first.device,
            f"{name} is on {None if tensor is None else tensor.device}, the data on {first.device}: move it there.",
        )
