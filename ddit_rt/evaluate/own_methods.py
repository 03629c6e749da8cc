"""DDiT in its forms: by its own decisions, by fitted schedules, and with a trained adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..schedule import pattern
from .baselines import fixed
from .methods import Method


def fitted_methods(
    steps: int, name: str, kind: str, schedules: Mapping[str, Sequence[int]], coarse: str = "delta", **settings: Any
) -> list[Method]:
    """Schedules that were fitted to the model.

    Args:
        name: Begins the methods' names.
        schedules: Label -> schedule.
        coarse, settings: What coarse steps run.
    """
    return [
        fixed(f"{name}-{label}", kind, steps, found, coarse=coarse, **settings) for label, found in schedules.items()
    ]


def target_methods(steps: int, speedups: Sequence[float]) -> list[Method]:
    """The rule behind ``accelerate(pipe, speedup=...)``, which is measured on no model, for both references."""
    return [
        Method(f"{name}-{speedup:g}x@{steps}", kind, steps, steps, {"target": {"speedup": speedup, "reference": aim}})
        for name, kind, aim in (("target", "DDiT, target", "plain"), ("converged", "DDiT, converged", "converged"))
        for speedup in speedups
    ]


def adapter_methods(steps: int, adapter: str, fitted: Sequence[Method] = (), full: bool = True) -> list[Method]:
    """Fixed schedules whose coarse steps run a trained adapter.

    Args:
        adapter: Its path.
        fitted: Methods of :func:`fitted_methods`, whose schedules the adapter runs too.
        full: False for the few that a second step count is shown with.
    """
    cycles = {"2p-3": [1, 2, 2], "4p-3": [1, 4, 4]}
    if full:
        cycles |= {"4p-6": [1, 4, 4, 4, 4, 4], "mix-100400": [1, 0, 0, 4, 0, 0]}
    run = {"adapter": str(adapter), "coarse": "adapter"}
    methods = [fixed(f"adapter-{name}", "adapter", steps, pattern(steps, cycles[name]), **run) for name in cycles]
    for method in fitted:
        assert method.settings is not None
        settings = {**method.settings, **run}
        methods.append(Method(f"adapter-{method.name}", "adapter, fitted", steps, steps, settings))
    return methods


def policy_methods(
    steps: int, name: str, kind: str, thresholds: Mapping[str, float], settings: Mapping[str, Any] | None = None
) -> list[Method]:
    """DDiT with its own decisions, over τ.

    Args:
        name: Begins the methods' names.
        thresholds: Label -> τ.
        settings: Further settings of ``accelerate``.
    """
    return [
        Method(f"{name}-{label}@{steps}", kind, steps, steps, {**(settings or {}), "threshold": tau})
        for label, tau in thresholds.items()
    ]
