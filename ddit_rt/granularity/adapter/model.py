"""What is learned per multiple of the patch size: embedding, de-embedding, size embedding, residual block, LoRA.

A fresh :class:`Adapter` computes what band-split computes (:mod:`ddit_rt.granularity.paths.adapter`): its embedding is
the base model's embedding of the k x k means, its de-embedding repeats the base model's prediction k x k times, and
everything else starts at zero. Training therefore starts from band-split's quality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import nn

from ... import ops
from ...errors import AdapterMismatchError, ConfigError
from ...settings import shown
from ..geometry import patchify, unpatchify
from ..projections import PatchEmbedding, PatchProjections
from .lora import LoraSet

# far beyond any model, and small enough that no product of them overflows a tensor's size
_MOST = {"channels": 2**12, "condition": 2**12, "width": 2**20, "patch": 2**6, "rank": 2**20, "blocks": 2**20}


class ResidualBlock(nn.Module):
    """The way past the trunk, from before the embedding to after the de-embedding: patch by patch, zero at the start.

    Args:
        features, channels: Of input and output.
        side: Patch side in latent pixels.
        hidden: Width of the hidden layer.
    """

    def __init__(self, features: int, channels: int, side: int, hidden: int) -> None:
        super().__init__()
        area = side * side
        self.side = side
        self.linear = nn.Linear(features * area, channels * area)
        self.enter = nn.Linear(features * area, hidden)
        self.leave = nn.Linear(hidden, channels * area, bias=False)
        for zero in (self.linear.weight, self.linear.bias, self.leave.weight):
            nn.init.zeros_(zero)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, features, F, H, W) -> (B, channels, F, H, W)."""
        patches = patchify(latent, self.side)
        out = self.linear(patches) + self.leave(F.gelu(self.enter(patches)))
        return unpatchify(out, self.side, latent.shape[2], latent.shape[3] // self.side, latent.shape[4] // self.side)

    def tokens(self, latent: torch.Tensor, backend: str) -> torch.Tensor:
        """The same before patches are put back: (B, features, F, H, W) -> (B, N, channels·s·s), without gradients.

        Args:
            backend: Of :mod:`ddit_rt.ops`; the patches of ``latent`` are read where they lie.
        """

        def of_patches(layer: nn.Linear) -> torch.Tensor:
            weight = layer.weight.detach().view(layer.out_features, -1, self.side, self.side)
            return ops.patch_embed(latent, weight, layer.bias.detach(), self.side, backend=backend)

        straight, hidden = of_patches(self.linear), F.gelu(of_patches(self.enter))
        out = torch.addmm(straight.flatten(0, 1), hidden.flatten(0, 1), self.leave.weight.detach().mT)
        return out.unflatten(0, straight.shape[:2])


@dataclass(frozen=True)
class AdapterSpec:
    """Everything about an adapter that is not a weight; it travels in the file.

    Attributes:
        family: Name of the transformer family.
        multiples: The coarse sizes, ascending, without 1.
        channels, condition: Channels of the latent, and of what rides along un-noised (image-to-video).
        width: d.
        patch: The base model's patch size p.
        layers: Layers with LoRA: path inside the transformer -> (in_features, out_features).
        rank, alpha: Of the LoRA; its scale is alpha/rank.
        shared: One LoRA for all multiples instead of one each.
        memory: Whether the adapter sees the last full steps' predictions (:mod:`ddit_rt.granularity.paths.adapter`).
        positions: Coordinates that coarse tokens were trained with, ``"native"`` or ``"interpolated"``.
        base_model: Hub id or name of the base model.
        fingerprint: See :func:`fingerprint`; empty if unknown.
        blocks: Of the base model; None if unknown, as in older files.
        training: Summary of the training, JSON-ready.

    Raises:
        ConfigError: a value is out of range.
    """

    # of the check of a file's description: every value has its own type
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    family: str
    multiples: tuple[int, ...]
    channels: int
    condition: int
    width: int
    patch: int
    layers: Mapping[str, tuple[int, int]]
    rank: int = 32
    alpha: float = 32.0
    shared: bool = False
    memory: bool = True
    positions: str = "native"
    base_model: str = ""
    fingerprint: tuple[float, ...] = ()
    blocks: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (
            not self.multiples
            or any(k not in (2, 4) for k in self.multiples)
            or sorted(set(self.multiples)) != list(self.multiples)
        ):
            raise ConfigError(f"multiples={self.multiples!r}: an adapter has the sizes (2,), (4,) or (2, 4).")
        for name, most in _MOST.items():
            if name == "blocks" and self.blocks is None:
                continue
            least = 0 if name in ("condition", "blocks") else 1
            if not _within(getattr(self, name), least, most):
                raise ConfigError(f"{name}={shown(getattr(self, name))}: a whole number, {least} to {most}.")
        for path, sizes in self.layers.items():
            if not re.fullmatch(r"\w+(\.\w+)*", path):
                raise ConfigError(f"layers: {shown(path)} is no path of a layer, as in 'blocks.0.ff'.")
            if len(sizes) != 2 or not all(_within(size, 1, _MOST["width"]) for size in sizes):
                raise ConfigError(f"layers: {path} has the sizes {shown(sizes)}: in and out, 1 to {_MOST['width']}.")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha={self.alpha!r}: a finite number.")
        if not all(abs(value) < 1e9 for value in self.fingerprint):
            raise ConfigError(f"fingerprint={shown(self.fingerprint)}: values of a model's weights, finite.")
        if self.positions not in ("native", "interpolated"):
            raise ConfigError(f"positions={self.positions!r}: use 'native' or 'interpolated'.")

    @property
    def reach(self) -> int | None:
        """Longest run of coarse steps it was trained for; None where it makes no difference, or is unknown."""
        reach = self.training.get("max_gap")
        return reach if self.memory and isinstance(reach, int) and reach >= 1 else None

    @property
    def extra(self) -> int:
        """Input channels beside the latent's: σ, and with memory two predictions, their distance and their presence."""
        return 1 + (2 * self.channels + 2 if self.memory else 0)


def _within(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most


class CoarseSize(nn.Module):
    """The learned parts of one multiple, LoRA excepted.

    Attributes:
        embedding: In and out of the trunk.
        residual: Past the trunk.
        trust: (C,), with memory: how far the straight line through the last predictions replaces band-split.
    """

    def __init__(self, spec: AdapterSpec, ends: PatchProjections, multiple: int) -> None:
        super().__init__()
        self.embedding = PatchEmbedding.of_means(ends, multiple, spec.extra)
        if spec.memory:
            self.trust = nn.Parameter(torch.zeros(spec.channels))
        self.residual = ResidualBlock(spec.channels + spec.extra, spec.channels, multiple * spec.patch, spec.width)


class Adapter(nn.Module):
    """The learned parts of all multiples.

    Args:
        spec: Its description.
        ends: Of the base model; None leaves the weights to be loaded (on the meta device).

    Attributes:
        spec: Its description.
    """

    def __init__(self, spec: AdapterSpec, ends: PatchProjections | None = None) -> None:
        super().__init__()
        self.spec = spec
        if ends is None:
            with torch.device("meta"):
                self._build(_empty_ends(spec))
        else:
            self._build(ends)

    def _build(self, ends: PatchProjections) -> None:
        spec = self.spec
        self.sizes = nn.ModuleDict({str(k): CoarseSize(spec, ends, k) for k in spec.multiples})
        names = ["shared"] if spec.shared else [str(k) for k in spec.multiples]
        self.loras = nn.ModuleDict({name: LoraSet(spec.layers, spec.rank, spec.alpha) for name in names})

    def size(self, multiple: int) -> CoarseSize:
        """The learned parts of ``multiple``.

        Raises:
            AdapterMismatchError: the adapter was not trained for it.
        """
        if multiple not in self.spec.multiples:
            raise AdapterMismatchError(f"the adapter has the multiples {self.spec.multiples}, not {multiple}.")
        return self.sizes[str(multiple)]  # type: ignore[return-value]

    def lora(self, multiple: int) -> LoraSet:
        """The LoRA that belongs to a coarse run at ``multiple``."""
        return self.loras["shared" if self.spec.shared else str(multiple)]  # type: ignore[return-value]

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves and casts the weights in place, if they are elsewhere."""
        one = next(self.parameters())
        if one.device != device or one.dtype != dtype:
            self.to(device=device, dtype=dtype)

    def flops(self, multiple: int, image_tokens: int, text_tokens: int, merged: bool = False) -> float:
        """What the learned parts add per sample to a run of the base model at ``multiple`` (2 per multiply-add).

        Counts every layer with LoRA as seeing all tokens, an upper bound where text has layers of its own; none if the
        LoRA is ``merged``.
        """
        spec = self.spec
        lora = 0 if merged else sum(spec.rank * (inputs + outputs) for inputs, outputs in spec.layers.values())
        area = (multiple * spec.patch) ** 2
        features, channels = (spec.channels + spec.extra) * area, spec.channels * area
        ends = (features + spec.condition * area + 2 * channels) * spec.width
        residual = features * channels + (features + channels) * spec.width
        return 2.0 * ((image_tokens + text_tokens) * lora + image_tokens * (ends + residual))


def _empty_ends(spec: AdapterSpec) -> PatchProjections:
    area, inputs = spec.patch**2, spec.channels + spec.condition
    return PatchProjections(
        torch.empty(spec.width, inputs, spec.patch, spec.patch),
        torch.empty(spec.width),
        torch.empty(area * spec.channels, spec.width),
        torch.empty(area * spec.channels),
    )
