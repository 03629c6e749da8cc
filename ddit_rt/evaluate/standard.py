"""The standard evaluation: which methods it compares, at which thresholds, found on the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import OutOfReachError
from ..fitting import calibrate, find_schedule, measure
from ..granularity import load_adapter
from ..multiples import SKIP
from ..schedule import initial_steps
from .baselines import BASELINES, Listing, TeaCache
from .methods import Method
from .own_methods import adapter_methods, fitted_methods, policy_methods, target_methods
from .settings import read_methods
from .sweep import Plan

logger = logging.getLogger(__name__)
T = TypeVar("T")

APART = 4
"""Prompts to calibrate and fit on."""


@dataclass(frozen=True)
class FittedSpec:
    """A family of fitted schedules: the kinds of steps they may use, and the FLOP ratios for which they are found.

    ``further`` are those at step counts after the first.
    """

    name: str
    kind: str
    kinds: tuple[int, ...]
    speedups: tuple[float, ...]
    further: tuple[float, ...]


FITTED = (
    FittedSpec("fitted", "DDiT, fitted", (1, 2, 4, 0), (1.5, 2, 2.5, 3, 4), (1.5, 2, 3)),
    FittedSpec("fitted-coarse", "fitted, coarse only", (1, 2, 4), (1.5, 2), (1.5,)),
    FittedSpec("fitted-skipped", "fitted, skipped only", (1, 0), (2, 3, 4), (2, 3)),
)
"""The latter two show what either kind of step adds."""

TARGETS = (1.5, 2, 3, 4, 6)
"""FLOP ratios at which the rule without measurement is compared."""

FITTED_ADAPTER = FittedSpec("fitted-adapter", "fitted to the adapter", (1, 2, 4, 0), (1.5, 2, 3, 4), (2, 3))


PAPER_THRESHOLD = 1e-3
"""τ of all the paper's experiments, on FLUX and on Wan."""


@dataclass(frozen=True)
class PolicySpec:
    """A way to let DDiT decide, and the FLOP ratios for which its τ is found."""

    name: str
    kind: str
    speedups: tuple[float, ...]
    settings: Mapping[str, Any]
    teacache: bool = False


def policies(steps: int) -> list[PolicySpec]:
    """The forms of the policy that are compared: the paper's, one with spacing rules, and one with skipped steps."""
    initial_full_steps = initial_steps(steps)
    spaced = {"initial_full_steps": initial_full_steps, "max_consecutive_coarse": 3}
    skipped = {
        "initial_full_steps": initial_full_steps, "multiples": [1], "skip_below": 1.0, "max_consecutive_skipped": 3
    }  # fmt: skip
    return [
        PolicySpec("ddit", "DDiT", (1.3, 1.6), {}),
        PolicySpec("ddit-spaced", "DDiT, spaced", (1.6,), spaced, teacache=True),
        PolicySpec("ddit-skipped", "DDiT, skipped steps", (2.0,), skipped),
    ]


def standard_plan(
    pipe: Any,
    model: str,
    prompts: Sequence[str],
    steps: Sequence[int],
    seeds: Sequence[int],
    call: Mapping[str, Any],
    metrics: Sequence[str],
    *,
    fit_baselines: bool = False,
    apart: Sequence[str] = (),
    methods_file: Path | None = None,
    adapter: Path | None = None,
    converged: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Calibrates what has to be calibrated and lists the methods.

    τ and schedules are found for given FLOP ratios.

    Args:
        pipe: The pipeline; left plain.
        model: Its name.
        prompts, seeds, metrics: Of the :class:`Plan`.
        steps: Plain step counts; the first gets every method, the others a few.
        call: Arguments of the pipeline besides prompt and steps, JSON-ready.
        fit_baselines: Fit the baselines' coefficients to the model, where none are published for it; otherwise the
            published ones are taken.
        apart: Prompts to calibrate and fit on, best none of ``prompts``; the first of those if there are none.
        methods_file: Methods to run instead of these.
        adapter: A trained adapter to run too, after these or those of the file.
        converged: Of the :class:`Plan`.
        progress: Called with a line of text now and then.
    """
    arguments = {name: value for name, value in call.items() if name != "num_inference_steps"}
    if methods_file is not None:
        methods = read_methods(methods_file)
    else:
        for baseline in BASELINES:
            if baseline.missing is not None:
                # a line of progress would be gone with the next
                logger.warning("%s is not compared: it %s", baseline.name, baseline.missing)
        methods = []
        for number, count in enumerate(steps):
            listing = Listing(
                pipe,
                count,
                {**arguments, "num_inference_steps": count},
                list(apart or prompts[:APART]),
                full=number == 0,
                fit=fit_baselines,
                progress=progress,
            )
            methods += _methods(listing)
    plan = Plan(model, methods, list(prompts), list(seeds), arguments, list(metrics), converged)
    if adapter is None:
        return plan
    return with_adapter(plan, str(adapter), pipe, list(apart or prompts[:APART]), progress)


def with_adapter(
    plan: Plan,
    adapter: str,
    pipe: Any,
    apart: Sequence[str],
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The plan and, where it lacks them, methods with an adapter, for each of its plain step counts.

    Args:
        plan: Without them, or with some.
        adapter: Path of the trained adapter.
        pipe, apart, progress: As for :func:`standard_plan`.
    """
    known = {method.name for method in plan.methods}
    references = [method.steps for method in plan.methods if method.is_reference]
    listed: list[Method] = []
    for number, steps in enumerate(references):
        call = {**plan.call, "num_inference_steps": steps}
        listed += _with_adapter(pipe, adapter, apart, steps, call, plan.methods, number == 0, progress)
    return replace(plan, methods=[*plan.methods, *(method for method in listed if method.name not in known)])


def _with_adapter(
    pipe: Any,
    adapter: str,
    apart: Sequence[str],
    steps: int,
    call: Mapping[str, Any],
    methods: Sequence[Method],
    full: bool,
    progress: Callable[[str], None],
) -> list[Method]:
    """Fixed schedules, those fitted to delta, and those fitted to the adapter itself."""
    spec = FITTED_ADAPTER
    trained = load_adapter(adapter)
    error_model = measure(pipe, apart, trained.spec.multiples, 0, progress, trained, **call)
    progress("searching the adapter's schedules")
    kinds = [kind for kind in spec.kinds if kind in (1, *trained.spec.multiples, SKIP)]
    speedups = spec.speedups if full else spec.further
    schedules = _within_reach(spec.name, steps, speedups, lambda speedup: find_schedule(error_model, speedup, kinds))
    own = fitted_methods(steps, spec.name, spec.kind, schedules, adapter=adapter, coarse="adapter")
    # side by side with those that were fitted to delta at the same ratio
    beside = {f"{FITTED[0].name}-{label}@{steps}" for label in schedules}
    deltas = [method for method in _mixed(methods, steps) if method.name in beside]
    return [*adapter_methods(steps, adapter, deltas, full), *own]


def _mixed(methods: Sequence[Method], steps: int) -> list[Method]:
    """The fitted methods of ``steps`` steps that may use every kind of step."""
    return [method for method in methods if method.kind == FITTED[0].kind and method.steps == steps]


def _methods(listing: Listing) -> list[Method]:
    """The plain run, the baselines and our own methods for one step count."""
    pipe, steps, call, full, progress = listing.pipe, listing.steps, listing.call, listing.full, listing.progress
    apart = listing.prompts
    methods = [Method(f"base@{steps}", "base", steps, steps)]
    for baseline in BASELINES:
        if baseline.missing is None:
            methods += baseline.methods(listing)
    methods += target_methods(steps, TARGETS)
    cache = TeaCache.gentlest(methods)
    methods += policy_methods(steps, "ddit-tau", "DDiT, the paper's τ", {f"{PAPER_THRESHOLD:g}": PAPER_THRESHOLD})
    for spec in policies(steps):

        def threshold(speedup: float, spec: PolicySpec = spec) -> float:
            return calibrate(pipe, apart[:2], speedup, spec.settings, 4, 0, progress, **call).threshold

        speedups = spec.speedups if full else spec.speedups[-1:]
        thresholds = _within_reach(spec.name, steps, speedups, threshold)
        methods += policy_methods(steps, spec.name, spec.kind, thresholds, spec.settings)
        if spec.teacache:
            both = {**spec.settings, "cache": cache}
            methods += policy_methods(steps, f"{spec.name}+teacache", f"{spec.kind} + TeaCache", thresholds, both)
    error_model = measure(pipe, apart, (2, 4), 0, progress, **call)
    progress("searching schedules")
    for family in FITTED:

        def schedule(speedup: float, kinds: Sequence[int] = family.kinds) -> list[int]:
            return find_schedule(error_model, speedup, kinds)

        schedules = _within_reach(family.name, steps, family.speedups if full else family.further, schedule)
        methods += fitted_methods(steps, family.name, family.kind, schedules)
    return methods


def _within_reach(name: str, steps: int, speedups: Sequence[float], find: Callable[[float], T]) -> dict[str, T]:
    """Label -> what ``find`` gives for a speed-up; those out of reach are left out with a warning."""
    found = {}
    for speedup in speedups:
        try:
            found[f"{speedup:g}x"] = find(speedup)
        except OutOfReachError as error:
            logger.warning("%s-%gx@%d is left out: %s", name, speedup, steps, error)
    return found
