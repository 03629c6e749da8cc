"""One call of a diffusion model by ComfyUI, as a wrapper of its DIFFUSION_MODEL sees it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...granularity import Geometry

OPTIONS = "transformer_options"

# what has nothing to do with the number of tokens; anything else that is given keeps a call at the model's own size
_BESIDE = frozenset(
    {
        "attention_mask", "cap_feats", "cap_mask", "clip_fea", "context", "frame_rate", "guidance", "num_tokens",
        "txt_byt5", "y", OPTIONS,
    }
)  # fmt: skip
# what changes a model's prediction while the conditioning stays the same
_SWITCHES = ("control", "ref_latents", "ref_latent", "reference_latent")
_PATCHES = ("patches", "patches_replace")


def patch_of(module: Any) -> int | None:
    """The patch size of a diffusion model in latent pixels; None if it tells none, or divides frames too."""
    size = getattr(module, "patch_size", None)
    if isinstance(size, Sequence) and len(size) == 3 and size[0] == 1 and size[1] == size[2]:
        size = size[1]
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class DiffusionCall:
    """What a call holds.

    Attributes:
        executor: Runs the wrappers below and the model.
        positional, named: The arguments as they came.
        arguments: The same by the names that the model gives them.
        options: ``transformer_options``.
    """

    executor: Callable[..., Any]
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def read(cls, executor: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> DiffusionCall | None:
        """The call, or None if it has no single latent tensor, or does not tell its conditionings."""
        signature = inspect.signature(executor.original)
        arguments: dict[str, Any] = {}
        for name, value in signature.bind(*positional, **named).arguments.items():
            is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            arguments.update(value if is_rest else {name: value})
        # a forward that another node has put in the model's place may name nothing
        unnamed = (value for value in positional if isinstance(value, dict) and "uuids" in value)
        options = arguments.get(OPTIONS) or next(unnamed, {})
        latent = positional[0] if positional else None
        uuids = options.get("uuids")
        if not uuids or not isinstance(latent, torch.Tensor) or latent.ndim < 3 or len(positional) < 2:
            return None
        if latent.shape[0] % len(uuids):
            return None
        return cls(executor, tuple(positional), dict(named), arguments, options)

    @property
    def latent(self) -> torch.Tensor:
        """(B, C, H, W) or (B, C, F, H, W), in the model's dtype; B counts the conditionings too."""
        return self.positional[0]

    @property
    def uuids(self) -> list[Any]:
        """One per conditioning; the batch holds as many equal parts."""
        return list(self.options["uuids"])

    @property
    def switches(self) -> tuple[bool, ...]:
        """Whether references and a ControlNet are there."""
        return tuple(self.arguments.get(name) is not None for name in _SWITCHES)

    @property
    def text_tokens(self) -> int:
        context = self.arguments.get("context")
        return context.shape[1] if isinstance(context, torch.Tensor) and context.ndim == 3 else 0

    def obstacle(self, channels: int) -> str:
        """Why the call cannot run on coarse tokens; empty if it can.

        Args:
            channels: Of the model's prediction.
        """
        module, latent = getattr(self.executor, "class_obj", None), self.latent
        if OPTIONS not in self.arguments:
            return "the model's forward does not name what it is given"
        given = [name for name, value in self.arguments.items() if value is not None][2:]
        beside = next((name for name in given if name not in _BESIDE and not _empty(self.arguments[name])), None)
        if beside is not None:
            return f"{beside} is of the model's own token grid"
        if any(self.options.get(name) for name in _PATCHES):
            return "another node's patches are of the model's own token grid"
        if patch_of(module) is None or latent.ndim not in (4, 5):
            return "the model tells no patch size"
        if latent.shape[1] != channels:
            return "a picture rides along in the latent's channels"
        return "" if _is_plain_time(self.positional[1]) else "every frame has a noise level of its own"

    def geometry(self) -> Geometry:
        """Of the latent; where :meth:`obstacle` is empty."""
        latent, patch = canonical(self.latent), patch_of(self.executor.class_obj)  # type: ignore[attr-defined]
        assert patch is not None
        channels, frames, height, width = latent.shape[1:]
        return Geometry(channels, frames, height, width, patch)

    def run(self) -> Any:
        """The model's own result."""
        return self.executor(*self.positional, **self.named)

    def run_low(self, latent: torch.Tensor, share: float, rope: Mapping[str, float] | None) -> torch.Tensor:
        """The model on a smaller latent.

        Args:
            latent: (B, C, F, h, w) float32.
            share: Its noise level as a share of the call's: what a flow model is told of time is linear in it.
            rope: ``rope_options`` of the call, or None for the model's own.

        Returns:
            Its prediction, float32 (B, C, F, h, w).
        """
        options = dict(self.options) if rope is None else {**self.options, "rope_options": dict(rope)}
        given = [options if value is self.options else value for value in self.positional]
        given[0], given[1] = restored(latent, self.latent), self.positional[1] * share
        named = {name: options if value is self.options else value for name, value in self.named.items()}
        return canonical(self.executor(*given, **named)).float()


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as (B, C, 1, H, W); others as they are."""
    return tensor.unsqueeze(2) if tensor.ndim == 4 else tensor


def restored(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undoes :func:`canonical` for a call with the latent ``like``, in its dtype."""
    return (tensor.squeeze(2) if like.ndim == 4 else tensor).to(like.dtype)


def centred(own: Mapping[str, float] | None, multiple: int) -> dict[str, float]:
    """``rope_options`` that put coarse tokens at the centres of the fine ones that each covers.

    Fine token i lies at s·i + b, with s and b of the options that are set already; so coarse token j, the centre of
    k·j .. k·j + k - 1, lies at s·k·j + (b + s·(k - 1)/2).

    Args:
        own: The call's ``rope_options``.
        multiple: k.
    """
    found = dict(own or {})
    for axis in ("x", "y"):
        scale = found.get(f"scale_{axis}", 1.0)
        found[f"shift_{axis}"] = found.get(f"shift_{axis}", 0.0) + scale * (multiple - 1) / 2
        found[f"scale_{axis}"] = scale * multiple
    return found


def _is_plain_time(time: Any) -> bool:
    return isinstance(time, torch.Tensor) and time.ndim == 1


def _empty(value: Any) -> bool:
    """Whether an argument stands for nothing, as False and empty containers do."""
    return value is False or (isinstance(value, (list, tuple, dict)) and not value)
