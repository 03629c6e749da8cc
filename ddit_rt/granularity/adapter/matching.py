"""Whether an adapter was made for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...errors import AdapterMismatchError
from ..projections import PatchProjections
from .model import Adapter

_FINGERPRINT_TOLERANCE = 0.02  # of its norm: rounding to bfloat16 moves a value by 0.004 of itself


def check_fit(
    adapter: Adapter,
    family: str,
    ends: PatchProjections,
    layers: Mapping[str, tuple[int, int]],
    component: str,
    multiples: Sequence[int],
) -> None:
    """Checks that an adapter was made for a model.

    Args:
        adapter: The adapter.
        family: Name of the model's family.
        ends: Of the model.
        layers: Linear layers of the model, path -> (in_features, out_features).
        component: Name of the model inside its pipeline, for the message.
        multiples: Sizes that are asked of the adapter; 1 is the base model's own.

    Raises:
        AdapterMismatchError: naming what does not fit.
    """
    spec = adapter.spec
    if spec.family != family:
        raise AdapterMismatchError(f"the adapter is for {spec.family} models, {component} is {family}.")
    weight = ends.embed_weight
    found = {
        "width": weight.shape[0],
        "channels": ends.channels,
        "condition": weight.shape[1] - ends.channels,
        "patch": weight.shape[2],
    }
    for name, value in found.items():
        if getattr(spec, name) != value:
            raise AdapterMismatchError(
                f"the adapter was made for {name}={getattr(spec, name)}, {component} has {name}={value}: "
                f"it belongs to {spec.base_model or 'another model'}."
            )
    for path, sizes in spec.layers.items():
        if layers.get(path) != tuple(sizes):
            raise AdapterMismatchError(
                f"the adapter's LoRA for {path} is {tuple(sizes)} (in, out), {component} has "
                f"{layers.get(path, 'no such layer in use')}."
            )
    missing = [k for k in multiples if k != 1 and k not in spec.multiples]
    if missing:
        raise AdapterMismatchError(
            f"the adapter has no {', '.join(map(str, missing))}: pass multiples={(1, *spec.multiples)}."
        )
    if spec.fingerprint and torch.is_floating_point(weight):
        here, there = torch.tensor(fingerprint(ends, len(spec.fingerprint))), torch.tensor(spec.fingerprint)
        if float((here - there).norm()) > _FINGERPRINT_TOLERANCE * float(there.norm()):
            raise AdapterMismatchError(
                f"the adapter was trained on {spec.base_model or 'another model'}; the embedding of {component} has "
                "other weights. Load that model, or distill an adapter for this one."
            )


def fingerprint(ends: PatchProjections, count: int = 64) -> tuple[float, ...]:
    """Values of the base embedding's weight at evenly spread places: equal up to rounding in every precision of it.

    Args:
        ends: Of the base model.
        count: Values to take.
    """
    values = ends.embed_weight.detach().flatten()
    places = torch.linspace(0, values.numel() - 1, count, device=values.device).long()
    return tuple(round(value, 6) for value in values[places].float().tolist())
