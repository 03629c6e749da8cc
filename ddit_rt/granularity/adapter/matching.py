"""Whether an adapter was made for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import AdapterMismatchError
from ..projections import PatchProjections
from .model import Adapter

# of its norm: rounding moves a value by 0.004 of itself in bfloat16, by up to 0.06 in 8 bits; another model is above 1
_TOLERANCE = {True: 0.02, False: 0.1}


@dataclass(frozen=True)
class ModelFacts:
    """What of a model an adapter depends on.

    Attributes:
        family: Name of the model's family.
        projections: Its embedding and de-embedding.
        layers: Its linear layers, path -> (in_features, out_features).
        own_embedding: The embedding's weight without a user's fused LoRA; None where it cannot be told.
        blocks: How many it has.
    """

    family: str
    projections: PatchProjections
    layers: Mapping[str, tuple[int, int]]
    own_embedding: torch.Tensor | None
    blocks: int


def check_fit(adapter: Adapter, facts: ModelFacts, component: str, multiples: Sequence[int]) -> None:
    """Checks that an adapter was made for a model.

    Args:
        adapter: The adapter.
        facts: Of the model.
        component: Name of the model inside its pipeline, for the message.
        multiples: Sizes that are asked of the adapter; 1 is the base model's own.

    Raises:
        AdapterMismatchError: naming what does not fit.
    """
    spec = adapter.spec
    if spec.family != facts.family:
        raise AdapterMismatchError(f"the adapter is for {spec.family} models, {component} is {facts.family}.")
    weight = facts.projections.embed_weight
    found = {
        "width": weight.shape[0],
        "channels": facts.projections.channels,
        "condition": weight.shape[1] - facts.projections.channels,
        "patch": weight.shape[2],
        # models of several depths may be cut from one, and share its embedding
        "blocks": facts.blocks,
    }
    for name, value in found.items():
        if getattr(spec, name) not in (value, None):
            raise AdapterMismatchError(
                f"the adapter was made for {name}={getattr(spec, name)}, {component} has {name}={value}: "
                f"it belongs to {spec.base_model or 'another model'}."
            )
    for path, sizes in spec.layers.items():
        if facts.layers.get(path) != tuple(sizes):
            raise AdapterMismatchError(
                f"the adapter's LoRA for {path} is {tuple(sizes)} (in, out), {component} has "
                f"{facts.layers.get(path, 'no such layer in use')}."
            )
    missing = [k for k in multiples if k != 1 and k not in spec.multiples]
    if missing:
        raise AdapterMismatchError(
            f"the adapter has no {', '.join(map(str, missing))}: pass multiples={(1, *spec.multiples)}."
        )
    own = facts.own_embedding
    if spec.fingerprint and own is not None and torch.is_floating_point(own):
        here, there = torch.tensor(fingerprint(own, len(spec.fingerprint))), torch.tensor(spec.fingerprint)
        if float((here - there).norm()) > _TOLERANCE[own.element_size() > 1] * float(there.norm()):
            raise AdapterMismatchError(
                f"the adapter was trained on {spec.base_model or 'another model'}; the embedding of {component} has "
                "other weights. Load that model, distill an adapter for this one, or unfuse a LoRA that changed it."
            )


def fingerprint(embedding: torch.Tensor, count: int = 64) -> tuple[float, ...]:
    """Values of the base embedding's weight at evenly spread places: equal up to rounding in every precision of it.

    Args:
        embedding: The weight, (d, C, p, p).
        count: Values to take.
    """
    values = embedding.detach().flatten()
    places = torch.linspace(0, values.numel() - 1, count, device=values.device).long()
    # one by one: 8-bit floats cannot be gathered everywhere
    return tuple(round(float(values[place]), 6) for place in places.tolist())
