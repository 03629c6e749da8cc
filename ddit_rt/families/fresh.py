"""A fresh adapter for a model: what distillation starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..errors import ConfigError, UnsupportedPipelineError
from ..granularity import Adapter, AdapterSpec, fingerprint
from ..multiples import SUPPORTED_MULTIPLES
from ..settings import shown
from .base import Family


def fresh_adapter(
    family: Family,
    transformer: nn.Module,
    *,
    multiples: tuple[int, ...] | None = None,
    targets: Sequence[str] = ("feed-forward",),
    rank: int = 32,
    alpha: float | None = None,
    shared: bool = False,
    memory: bool = True,
    positions: str = "native",
    base_model: str = "",
    training: dict[str, Any] | None = None,
) -> Adapter:
    """An untrained adapter: it computes what band-split computes.

    Args:
        family: Of the model.
        transformer: The model; it is read, not changed. The adapter's ends begin with what LoRAs add to the model's.
        targets: Layers that get LoRA, see :meth:`Family.target_layers`; the feed-forward's are the paper's.
        multiples: Coarse sizes in space; None takes all that the family can work with.
        rank, alpha, shared, memory, positions, base_model, training: See
            :class:`ddit_rt.granularity.AdapterSpec`; ``alpha`` None is the rank (a scale of 1).

    Returns:
        float32 weights on the model's device.

    Raises:
        ConfigError: a value is out of range, or the family cannot work with one of the multiples.
        UnsupportedPipelineError: the model's embedding is quantised, so there is nothing to start from.
    """
    if isinstance(targets, str) or not _holds(targets, str):
        raise ConfigError(f"targets={shown(targets)}: a tuple of names, as in ('feed-forward', 'attention').")
    if multiples is not None and not _holds(multiples, int):
        raise ConfigError(f"multiples={shown(multiples)}: coarse sizes, as in (2, 4).")
    if alpha is not None and not isinstance(alpha, int | float):
        raise ConfigError(f"alpha={shown(alpha)}: a number, or None for the rank.")
    coarse = tuple(k for k in family.multiples if k > 1 and k in SUPPORTED_MULTIPLES)
    multiples = coarse if multiples is None else tuple(multiples)
    if any(k in SUPPORTED_MULTIPLES and k not in family.multiples for k in multiples):
        raise ConfigError(f"multiples={multiples}: models of family {family.name} can work with {coarse} only.")
    base = unwrap_module(transformer)
    facts = family.facts(base)
    ends, own = facts.projections, facts.own_embedding
    if not ends.embed_weight.is_floating_point():
        raise UnsupportedPipelineError("the model's embedding is quantised: load the model with its own weights.")
    # of a quantised embedding a LoRA's part cannot be told
    if own is None and not family.loras_on_ends(base):
        own = ends.embed_weight
    spec = AdapterSpec(
        family=family.name,
        multiples=multiples,
        channels=ends.channels,
        condition=ends.embed_weight.shape[1] - ends.channels,
        width=ends.embed_weight.shape[0],
        patch=ends.embed_weight.shape[2],
        layers=family.target_layers(base, targets),
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        shared=shared,
        memory=memory,
        positions=positions,
        base_model=base_model,
        fingerprint=() if own is None else fingerprint(own),
        blocks=facts.blocks,
        training=training or {},
    )
    return Adapter(spec, ends).to(device=ends.embed_weight.device).float()


def _holds(values: object, kind: type) -> bool:
    """Whether it is a sequence of nothing but ``kind``."""
    return isinstance(values, Sequence) and all(isinstance(value, kind) for value in values)
