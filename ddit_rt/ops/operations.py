"""The operations DDiT adds to a transformer, with one validated signature over two backends.

``backend="triton"`` runs the fused kernels of ``ddit_kernels`` (CUDA, or Triton's interpreter), ``"torch"`` the plain
PyTorch reference, ``"auto"`` picks Triton on CUDA and PyTorch elsewhere; the environment variable ``DDIT_BACKEND``
replaces ``"auto"``. Both give the same numbers within the tolerance of the dtype. The kernels have no backward:
``"auto"`` takes the reference while autograd records.

On CUDA, ``"auto"`` has one more question for the two that multiply matrices: is the kernel faster than a copied operand
and cuBLAS? Both are measured at the first call with a new problem (not while a graph is captured), the winner stays.

Packed latents: FLUX keeps (B, C, 2h, 2w) as tokens (B, h*w, C*4), channel order (c, row, column) inside a token.
``packed`` lets the operations read and write that layout without a copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ddit_kernels._common import BackendError, resolve_backend
from ddit_kernels._gemm import DTYPES as KERNEL_DTYPES
from ddit_kernels._gemm import gemm_unsupported
from ddit_kernels.band_rest import BandMemory, band_rest_reference, band_unsupported
from ddit_kernels.band_rest import band_rest as band_rest_triton
from ddit_kernels.evolve import evolve
from ddit_kernels.patch_deembed import patch_deembed as patch_deembed_triton
from ddit_kernels.patch_deembed import patch_deembed_reference
from ddit_kernels.patch_embed import patch_embed as patch_embed_triton
from ddit_kernels.patch_embed import patch_embed_reference

from .arguments import OpArgumentError, check_band, check_decision, check_deembed, check_embed, check_evolution
from .contest import Contest, measurable, signature

__all__ = [
    "KERNEL_DTYPES",
    "BackendError",
    "BandMemory",
    "BandRest",
    "OpArgumentError",
    "backend_of",
    "band_rest",
    "evolve_and_select",
    "latent_evolution",
    "patch_deembed",
    "patch_embed",
    "select_multiple",
]

CONTEST = Contest()
"""Between kernel and PyTorch, of this process."""


def latent_evolution(
    increments: Sequence[torch.Tensor],
    patch_sizes: Sequence[int],
    quantile: float,
    *,
    packed: tuple[int, int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Quantile over patches of the standard deviation, inside a patch, of the latent's n-th difference.

    With increments d_0, ..., d_(n-1) the n-th difference is sum_i (-1)^i C(n-1, i) d_i, in float32. For each patch
    size s the population standard deviation is taken over the s*s*C values of each patch of each frame (patches at the
    edge of a size that does not divide use the values that exist), then the quantile over all patches of a sample: rank
    quantile * (N - 1) in float64, interpolated linearly as ``torch.quantile`` does. Source: DDiT, arXiv 2602.16968.

    Args:
        increments: n tensors, newest first, each (B, C, H, W), (B, C, F, H, W), or (B, h*w, C*4) with ``packed``; any
            floating dtype, any strides.
        patch_sizes: S distinct patch sides in latent pixels, for example (4, 8) for 2p and 4p at p = 2.
        quantile: rho, from 0 to 1.
        packed: token grid (h, w) when increments are FLUX's packed tokens of 2 x 2 pixels.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        float32 (B, S). All NaN for a sample in which any standard deviation is not finite, as NaN or Inf make it.

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    check_evolution(increments, patch_sizes, quantile, packed)
    return evolve(increments, patch_sizes, quantile, 0.0, packed, None, backend)[1]()


def select_multiple(
    increments: Sequence[torch.Tensor],
    patch_sizes: Sequence[int],
    quantile: float,
    threshold: float,
    *,
    packed: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The coarsest patch size at which each sample evolves smoothly; agrees exactly with :func:`latent_evolution`.

    Args:
        increments, patch_sizes, quantile, packed, backend: as for :func:`latent_evolution`.
        threshold: tau >= 0; a size qualifies if its quantile is strictly below.
        out: int32 (B,), contiguous, on the increments' device or in pinned host memory, to receive the decision. With
            pinned memory and CUDA increments, wait for an event recorded after this call before reading it.

    Returns:
        int32 (B,): index into (none, \\*patch_sizes) of the largest qualifying size, 0 if none qualifies or the sample
        has a value that is not finite. It is ``out`` if that was given.

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    check_evolution(increments, patch_sizes, quantile, packed)
    check_decision(threshold, out, increments[0])
    return evolve(increments, patch_sizes, quantile, threshold, packed, out, backend)[0]


def evolve_and_select(
    increments: Sequence[torch.Tensor],
    patch_sizes: Sequence[int],
    quantile: float,
    threshold: float,
    *,
    packed: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    decided: Any = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`select_multiple` and :func:`latent_evolution` of the same increments, which are read only once.

    Args:
        increments, patch_sizes, quantile, threshold, packed, out, backend: as for :func:`select_multiple`.
        decided: a ``torch.cuda.Event`` to record as soon as the decision is written, before the quantile values, which
            take longer, are selected.

    Returns:
        (decision int32 (B,), quantiles float32 (B, S)).

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    check_evolution(increments, patch_sizes, quantile, packed)
    check_decision(threshold, out, increments[0])
    decision, quantiles = evolve(increments, patch_sizes, quantile, threshold, packed, out, backend)
    if decided is not None:
        decided.record(torch.cuda.current_stream(increments[0].device))
    return decision, quantiles()


def patch_embed(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    *,
    extra: torch.Tensor | None = None,
    size_embedding: torch.Tensor | None = None,
    mean_over: int = 1,
    scale: float | torch.Tensor = 1.0,
    packed: tuple[int, int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Tokens of a latent: patches of ``patch_size``, embedded.

    With ``mean_over`` = k the latent is first averaged over k x k pixels and multiplied by ``scale`` (in float32, then
    rounded to the weight's dtype), so that the coarse step of band-split needs no separate pass. Sizes that
    ``patch_size * mean_over`` does not divide are extended at the bottom and right by repeating the edge.

    Args:
        latent: (B, C, H, W), (B, C, F, H, W), or (B, h*w, C*4) with ``packed``; any floating dtype, any strides.
        weight: (d, C, s, s) as a convolution keeps it, or (d, C, 1, s, s); s = patch_size.
        bias: (d,) or None.
        patch_size: s, side of a patch in (averaged) latent pixels.
        extra: added to the tokens, broadcastable to (B, N, d): a position embedding, for example.
        size_embedding: (d,), added to every token.
        mean_over: k, see above.
        scale: multiplies the latent; a tensor (one element, or one per sample) may change between graph replays.
        packed: token grid (h, w) when latent is FLUX's packed tokens of 2 x 2 pixels.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, N, d) in the weight's dtype, N = F * ceil(H / (s*k)) * ceil(W / (s*k)), row-major in (frame, row, column).

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    check_embed(latent, weight, bias, patch_size, extra, size_embedding, mean_over, scale, packed)
    unsupported = gemm_unsupported(patch_size, mean_over, latent, weight, extra)
    tensors = (latent, weight, bias, extra, size_embedding, scale)
    chosen = resolved(backend, unsupported, *tensors)

    def reference() -> torch.Tensor:
        return patch_embed_reference(latent, weight, bias, patch_size, extra, size_embedding, mean_over, scale, packed)

    def kernel() -> torch.Tensor:
        factor, factors = (1.0, scale) if isinstance(scale, torch.Tensor) else (float(scale), None)
        options = (mean_over, factor, factors, None if packed is None else list(packed))
        return patch_embed_triton(latent, weight, bias, patch_size, extra, size_embedding, *options)

    if chosen == "triton" and is_open(backend):
        key = ("patch_embed", patch_size, mean_over, packed, *signature(*tensors))
        chosen = CONTEST.winner(key, {"triton": kernel, "torch": reference}, measurable(latent.device))
    return kernel() if chosen == "triton" else reference()


def patch_deembed(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    grid: tuple[int, int] | tuple[int, int, int],
    *,
    residual: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    spread_over: int = 1,
    size: tuple[int, int] | None = None,
    packed: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Latent of tokens: ``scale * (tokens @ weight.T + bias)``, un-patchified, plus ``residual``.

    With ``spread_over`` = k every value is written to k x k pixels (nearest-neighbour upsampling), the counterpart of
    ``mean_over`` in :func:`patch_embed`.

    Args:
        tokens: (B, N, d), row-major in (frame, row, column).
        weight: (s*s*C, d), rows ordered (row, column, channel) as Wan's ``proj_out``, or (s, s, C, d), where a view
            serves rows in another order without a copy (FLUX: ``weight.view(C, s, s, d).permute(1, 2, 0, 3)``);
            s = patch_size.
        bias: (s*s*C,) or (s, s, C), as the weight, or None.
        patch_size: s, side of a patch in latent pixels (before ``spread_over``).
        grid: tokens per axis, (h, w) or (f, h, w), with product N.
        residual: shape of the result, added last.
        scale: multiplies the projection; a tensor (one element, or one per sample) may change between graph replays.
        spread_over: k, see above.
        size: (H, W) of the result if smaller than (h, w) * s * k; bottom and right are cropped.
        packed: write FLUX's packed tokens instead of a latent.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, C, H, W) for a grid (h, w), (B, C, F, H, W) for (f, h, w), or (B, H/2 * W/2, C*4) if packed; contiguous, in
        the dtype of the weight, promoted with that of the residual.

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    height, width = check_deembed(tokens, weight, bias, patch_size, grid, residual, scale, spread_over, size, packed)
    pixels = (patch_size, patch_size, -1)
    weight = weight.unflatten(0, pixels) if weight.dim() == 2 else weight
    bias = bias.unflatten(0, pixels) if bias is not None and bias.dim() == 1 else bias
    unsupported = gemm_unsupported(patch_size, spread_over, tokens, weight, residual)
    tensors = (tokens, weight, bias, residual, scale)
    chosen = resolved(backend, unsupported, *tensors)

    def reference() -> torch.Tensor:
        return patch_deembed_reference(
            tokens, weight, bias, patch_size, grid, residual, scale, spread_over, size, packed
        )

    def kernel() -> torch.Tensor:
        factor, factors = (1.0, scale) if isinstance(scale, torch.Tensor) else (float(scale), None)
        options = (factor, factors, spread_over, [height, width], packed)
        return patch_deembed_triton(tokens, weight, bias, patch_size, list(grid), residual, *options)

    if chosen == "triton" and is_open(backend):
        key = ("patch_deembed", patch_size, tuple(grid), spread_over, size, packed, *signature(*tensors))
        chosen = CONTEST.winner(key, {"triton": kernel, "torch": reference}, measurable(tokens.device))
    return kernel() if chosen == "triton" else reference()


@dataclass(frozen=True)
class BandRest:
    """What :func:`band_rest` gives, all float32.

    Attributes:
        rest: (B, C, F, H, W); of a probe (B, C, F, rows, columns).
        scale: s, of the means that the model is given; (B,).
        gain: a, of the model's prediction; (B,), negative for a probe.
        level: σ', the noise level of the means; a single number as a 0-dim tensor where σ was one, else (B,).
    """

    rest: torch.Tensor
    scale: torch.Tensor
    gain: torch.Tensor
    level: torch.Tensor


def band_rest(
    latent: torch.Tensor,
    level: torch.Tensor,
    multiple: int,
    *,
    grid: tuple[int, int] | None = None,
    memory: BandMemory | None = None,
    backend: str = "auto",
) -> BandRest:
    """All of a band-split step's velocity that no model call makes: v = up(gain·v') + rest.

    v' is the model's prediction on ``scale``·down(latent) at noise level ``level`` of the result, which
    :func:`patch_embed` (``mean_over``, ``scale``) reads and :func:`patch_deembed` (``spread_over``, ``scale``,
    ``residual``) writes. What a full step's residual is, v_low of the full prediction less the coarse one, comes the
    same way from a ``"probe"``: gain·v' + rest.

    Args:
        latent: z, (B, C, F, H, W), float32, bfloat16 or float16, any strides.
        level: σ, a float tensor of one element or B.
        multiple: k.
        grid: Rows and columns of k x k blocks, where padding adds some; else as many as cover the latent.
        memory: The last full steps, and where the high band comes from: the noise left in the latent (``"latent"``),
            the same over the clean latent of the last full step (``"clean"``), or the line through the last two
            predictions (``"line"``). None: nothing is remembered, and the first.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        OpArgumentError: wrong shapes, dtypes or ranges.
        BackendError: ``backend="triton"`` where it cannot run.
    """
    memory = memory or BandMemory()
    blocks = check_band(latent, level, multiple, grid, memory)
    tensors = (memory.anchor, memory.newest, memory.older, memory.residual, memory.residual_older)
    unsupported = band_unsupported(multiple, latent, *tensors)
    if resolved(backend, unsupported, latent, *tensors) == "torch":
        rest, factors = band_rest_reference(latent, level, multiple, blocks, memory)
    else:
        levels = (memory.level_newest, memory.level_older)
        rest, factors = band_rest_triton(latent, level, multiple, list(blocks), memory.high, *tensors, *levels)
    scale, gain, low_level = factors.unbind(0)
    return BandRest(rest, scale, gain, low_level[0] if level.dim() == 0 else low_level)


def backend_of(backend: str, device: torch.device) -> str:
    """What ``backend`` stands for where tensors are on ``device``: ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: unknown backend, in the argument or in ``DDIT_BACKEND``.
        BackendError: Triton asked for by name, but not possible there.
    """
    return resolve_backend(backend, device)


def is_open(backend: str) -> bool:
    """Whether ``backend`` leaves the choice to a measurement where kernels can run, and one may be made."""
    return backend == "auto" and not os.environ.get("DDIT_BACKEND") and not torch.compiler.is_compiling()


def resolved(backend: str, unsupported: str | None, *tensors: torch.Tensor | float | None) -> str:
    """``resolve_backend`` for kernels without a backward, which cannot run while autograd records."""
    held = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held):
        unsupported = "an argument requires a gradient and the kernel has none; use torch.no_grad() or the reference."
    return resolve_backend(backend, held[0].device, unsupported)
