"""Which of diffusers' attention back-ends a transformer runs on: by the card and what is installed, or by name.

Back-ends are known by the values of diffusers' ``AttentionBackendName``. Left to itself, the choice falls on those
alone that compute in the precision of their operands; SageAttention, which multiplies in 8 bits, has to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
)
from torch import nn

from ..errors import ConfigError

NATIVE, CUDNN, FLASH_3 = "native", "_native_cudnn", "_flash_3"
MOST_WIDE = 128
"""Values per head up to which all of these compute on every card that they are taken on."""


@dataclass(frozen=True)
class Attention:
    """A back-end.

    Attributes:
        backend: diffusers' name for it.
        reason: Why it was taken.
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def unusable(backend: str) -> str:
    """Why a back-end cannot be used in this installation, in diffusers' words; empty if it can."""
    if backend == CUDNN:
        return "" if torch.backends.cudnn.is_available() else "PyTorch has no cuDNN here."
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError as error:
        return str(error)
    return ""


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose_attention(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    width: int | None,
    unmasked: bool,
    obstacle: Callable[[str], str] = unusable,
) -> Attention:
    """The fastest back-end that computes in its operands' precision.

    On sm_90 FlashAttention-3 takes half to two thirds of the time of FlashAttention-2, which is PyTorch's own, and
    cuDNN comes near it (arXiv 2407.08608). FlashAttention-3 is for sm_90 alone, and the package of FlashAttention-2 has
    nothing that PyTorch has not.

    Args:
        capability: Of the device; None where it has none.
        dtype: Of the transformer.
        width: Values per head; None where that is not known.
        unmasked: Its attention takes no masks. FlashAttention-3 refuses them, and cuDNN some.
        obstacle: Back-end -> why it cannot be used; empty if it can.
    """
    if capability is None:
        return Attention(NATIVE, "no CUDA device")
    card = f"sm_{capability[0]}{capability[1]}"
    if not unmasked:
        return Attention(NATIVE, "the model's attention takes masks")
    if dtype not in (torch.bfloat16, torch.float16):
        return Attention(NATIVE, f"{str(dtype).removeprefix('torch.')} is for PyTorch's own alone")
    if width is None or width > MOST_WIDE or width % 8:
        return Attention(NATIVE, f"{width or 'unknown'} values per head")
    if capability[0] == 9 and not obstacle(FLASH_3):
        return Attention(FLASH_3, f"{card}, FlashAttention-3 is installed")
    if capability[0] in (9, 10) and not obstacle(CUDNN):
        return Attention(CUDNN, card)
    return Attention(NATIVE, f"{card}, where nothing of the same precision that is installed is faster")


def attention_by_name(
    backend: str, modules: Iterable[nn.Module], obstacle: Callable[[str], str] = unusable
) -> Attention:
    """A back-end that was asked for.

    Args:
        backend: Its name.
        modules: The transformers.
        obstacle: As for :func:`choose_attention`.

    Raises:
        ConfigError: diffusers has none of that name, it cannot be used here, or not in these transformers.
    """
    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise ConfigError(f"attention={backend!r}: use 'auto' or one of {', '.join(map(repr, names))}.")
    reason = obstacle(backend)
    if reason:
        raise ConfigError(f"attention={backend!r}: {reason} Or take attention='auto'.")
    name = AttentionBackendName(backend)
    for module in modules:
        processors = attention_processors(module)
        if not processors:
            raise ConfigError(
                f"attention={backend!r}: {type(module).__name__} has no attention whose back-end diffusers can change; "
                "leave it out."
            )
        divided = any(getattr(processor, "_parallel_config", None) is not None for processor in processors)
        if divided and not _AttentionBackendRegistry._is_context_parallel_available(name):
            raise ConfigError(
                f"attention={backend!r} does not work on tokens that are divided among ranks; take attention='native'."
            )
    return Attention(backend, "asked for")


class AttentionSwitch:
    """Has transformers run on a back-end, until it is taken off.

    The process's own back-end, which diffusers sets along with a transformer's, stays what it was.

    Args:
        modules: The transformers.
        backend: diffusers' name for it.
    """

    def __init__(self, modules: Iterable[nn.Module], backend: str) -> None:
        self._modules = list(modules)
        self._backend = AttentionBackendName(backend)
        self._before: list[tuple[Any, Any]] = []

    def put_on(self) -> None:
        """Switches. It may load a kernel from the hub, where that is what the back-end is."""
        active = _AttentionBackendRegistry.get_active_backend()[0]
        before = [(p, p._attention_backend) for module in self._modules for p in attention_processors(module)]
        try:
            for module in self._modules:
                module.set_attention_backend(self._backend.value)  # type: ignore[operator]
            self._before = before
        except BaseException:
            self._put_back(before)
            raise
        finally:
            _AttentionBackendRegistry.set_active_backend(active)

    def take_off(self) -> None:
        """Switches back what still runs on the back-end."""
        self._put_back(self._before)
        self._before = []

    def _put_back(self, before: Iterable[tuple[Any, Any]]) -> None:
        for processor, backend in before:
            if processor._attention_backend == self._backend:
                processor._attention_backend = backend


def attention_processors(module: nn.Module) -> list[Any]:
    """The processors of a transformer's attentions whose back-end diffusers can change."""
    found = (getattr(layer, "processor", None) for layer in module.modules())
    return [processor for processor in found if hasattr(processor, "_attention_backend")]
