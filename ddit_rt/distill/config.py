"""The settings of a distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError

OBJECTIVES = ("direct", "delta", "both")
WEIGHTINGS = ("even", "relative")
OPTIMIZERS = ("auto", "prodigy", "adamw")
TIMESTEPS = ("steps", "sigma")
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class DistillConfig:
    """How an adapter is trained. Two runs with equal settings, data and seed are equal bit for bit on a CPU.

    Args:
        steps: Optimizer steps.
        batch: Samples per device and micro-step; all share one multiple.
        accumulate: Micro-steps per optimizer step; each draws its own multiple.
        multiples: Coarse sizes to train.
        targets: Layers that get LoRA: ``"feed-forward"`` (the paper's), ``"attention"``, or regular expressions of
            paths, as in ``r"blocks\.\d+\.attn1\.to_[qkv]"``; see :meth:`ddit_rt.families.Family.target_layers`.
        rank, alpha, shared, memory, positions: See :class:`ddit_rt.granularity.AdapterSpec`.
        objective: ``"direct"`` is the paper's equation 1, the squared distance to the frozen base's prediction;
            ``"delta"`` asks for the change since an earlier step of the trajectory, what ``coarse="adapter-delta"``
            adds to the last full prediction; ``"both"`` takes turns.
        weighting: ``"even"``: every sample's squared error counts as it is. ``"relative"``: in units of the error that
            the forecast makes at that sample. Easy samples, where the forecast is nearly exact, then count as much
            as hard ones; evenly weighted they leave a floor of noise that costs more decibels than the hard ones gain.
            Steps without memory count evenly.
        optimizer: ``"auto"``: the family's, Prodigy for images and AdamW for video, as the paper has them.
        lr: None: 1.0 for Prodigy, 1e-4 for AdamW.
        weight_decay: Decoupled, of every weight.
        lr_warmup_steps: Steps over which the learning rate rises.
        lr_decay: Share of the steps, at the end, over which it falls to zero.
        ema: Decay of the average that is saved; 0 saves the weights themselves.
        clip: Largest norm of the gradient.
        max_gap: Longest distance, in steps, between a coarse step and the full step it remembers.
        blank: Share of micro-steps on a run's first steps, without memory.
        timesteps: ``"steps"`` draws the sampler's steps evenly, ``"sigma"`` in proportion to the noise they remove.
        fill: Share of the steps over which recording the base model's trajectories is spread; 0 records all first.
        held_out: Items at the end of the data that are kept for validation.
        checkpointing: Recompute the blocks in the backward pass: less memory, a third more time.
        precision: ``"bf16"`` runs the adapter under autocast; its own weights stay float32.
        checkpoint_every, validate_every: In steps.
        seed: Of everything random.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 20_000
    batch: int = 1
    accumulate: int = 4
    multiples: tuple[int, ...] = (2, 4)
    targets: tuple[str, ...] = ("feed-forward",)
    rank: int = 32
    alpha: float | None = None
    shared: bool = False
    memory: bool = True
    positions: str = "native"
    objective: str = "direct"
    weighting: str = "relative"
    optimizer: str = "auto"
    lr: float | None = None
    weight_decay: float = 0.01
    lr_warmup_steps: int = 100
    lr_decay: float = 0.5
    ema: float = 0.999
    clip: float = 1.0
    max_gap: int = 6
    blank: float = 0.1
    timesteps: str = "steps"
    fill: float = 0.5
    held_out: int = 8
    checkpointing: bool = False
    precision: str = "no"
    checkpoint_every: int = 500
    validate_every: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiples", tuple(sorted(self.multiples)))
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(f"targets={self.targets!r}: a tuple of names, as in ('feed-forward', 'attention').")
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in (
            "steps",
            "batch",
            "accumulate",
            "rank",
            "max_gap",
            "checkpoint_every",
            "validate_every",
            "held_out",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number, at least 1.")
        for name in ("lr_decay", "ema", "blank", "fill"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a number in [0, 1].")
        for name in ("clip", "weight_decay", "lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r}: a number >= 0.")
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("weighting", WEIGHTINGS),
            ("optimizer", OPTIMIZERS),
            ("timesteps", TIMESTEPS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(repr, allowed))}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "multiples": list(self.multiples), "targets": list(self.targets)}

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied with at ``step``, in [0, 1]: a linear rise, 1, a linear fall."""
        left = (self.steps - step) / self.steps
        fall = min(1.0, left / self.lr_decay) if self.lr_decay else 1.0
        return min(1.0, (step + 1) / self.lr_warmup_steps if self.lr_warmup_steps else 1.0) * fall


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """``name: a's value, b's value`` for every entry that differs."""
    return [f"{name}: {a.get(name)!r}, {b.get(name)!r}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
