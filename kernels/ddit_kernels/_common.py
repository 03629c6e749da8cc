"""What every kernel file shares: Triton when it is installed, the choice of backend, the packed FLUX layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:  # CPU-only installs of PyTorch come without Triton; the references below still work.
    HAS_TRITON = False

    class _Absent:
        """Lets ``@triton.jit`` functions be defined, never run, where Triton is missing."""

        constexpr: Any = None

        @staticmethod
        def jit(function: Any) -> Any:
            return function

        @staticmethod
        def autotune(**_: Any) -> Any:
            return _Absent.jit

        @staticmethod
        def Config(*arguments: Any, **_: Any) -> Any:
            return arguments

    triton = tl = _Absent()  # type: ignore[assignment]

# Triton reads the variable when a kernel is decorated, so a later change would not be honoured: read it once as well.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
BACKENDS = ("auto", "triton", "torch")


class BackendError(RuntimeError):
    """The requested backend cannot run these tensors here; the message says what would make it run."""


def resolve_backend(backend: str, device: torch.device, unsupported: str | None = None) -> str:
    """Turn ``backend`` into ``"triton"`` or ``"torch"``.

    ``"auto"`` means the value of the environment variable ``DDIT_BACKEND`` if it is set, else Triton for CUDA tensors
    and PyTorch for all others. An explicit ``backend`` argument wins over the variable.

    Args:
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        device: where the tensors are.
        unsupported: why the kernel cannot take these arguments, ``None`` if it can. ``"auto"`` then falls back.

    Raises:
        ValueError: unknown backend, in the argument or in ``DDIT_BACKEND``.
        BackendError: Triton asked for by name, but not possible.
    """
    source = "backend"
    if backend == "auto" and os.environ.get("DDIT_BACKEND"):
        backend, source = os.environ["DDIT_BACKEND"], "environment variable DDIT_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is not one of {', '.join(BACKENDS)}: pick one of these.")
    if backend == "torch":
        return "torch"
    if not HAS_TRITON:
        reason: str | None = "Triton is not installed; install it or use backend='torch'."
    elif device.type != "cuda" and not INTERPRETED:
        reason = (
            f"tensors are on {device.type!r}: Triton needs CUDA tensors, or TRITON_INTERPRET=1 in the environment "
            "before Python starts. Move the tensors or use backend='torch'."
        )
    else:
        reason = unsupported
    if backend == "auto":
        return "torch" if reason or device.type != "cuda" else "triton"
    if reason:
        raise BackendError(f"{source}='triton' cannot run here: {reason}")
    return "triton"


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch, so that running and ahead-of-time compilation cannot differ."""

    kernel: Any
    grid: Any  # a tuple, or a function of the chosen configuration's constants
    arguments: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of ``device``."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def latent_shape(latent: torch.Tensor, packed: Sequence[int] | None) -> tuple[int, int, int, int, int]:
    """(B, C, F, H, W) of a latent in any of its layouts."""
    if packed is not None:
        return latent.shape[0], latent.shape[2] // 4, 1, 2 * packed[0], 2 * packed[1]
    batch, channels, *frames, height, width = latent.shape
    return batch, channels, frames[0] if frames else 1, height, width


def memory_span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Values between the first and the last in memory; the kernels compute offsets in 32 bits."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides))


def split_strides(latent: torch.Tensor, packed: Sequence[int] | None) -> tuple[int, ...]:
    """Strides of a latent as the kernels take them: (batch, channel, frame, row block, row, column block, column).

    A block is a packed token of 2 x 2 pixels in the token grid ``packed``; without packing it is one pixel, and the
    strides inside it are 0.
    """
    if packed is not None:
        batch, token, feature = latent.stride()
        return batch, 4 * feature, 0, token * packed[1], 2 * feature, token, feature
    batch, channel, *frame, row, column = latent.stride()
    return batch, channel, frame[0] if frame else 0, row, 0, column, 0


def unpack_latent(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """FLUX's packed tokens as a latent: (B, h*w, C*4) -> (B, C, 2h, 2w), channel order (c, row, column); copies."""
    height, width = grid
    batch, _, features = tokens.shape
    blocks = tokens.reshape(batch, height, width, features // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, 2 * height, 2 * width)


def pack_latent(latent: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`unpack_latent`: (B, C, 2h, 2w) -> (B, h*w, C*4); copies."""
    batch, channels, height, width = latent.shape
    blocks = latent.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)
