"""The methods that an evaluation compares: DDiT in its forms, and what users would pick instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from ..config import TeaCacheConfig
from ..errors import ConfigError
from ..schedule import one_in, pattern
from .baselines.dbcache import check_settings

CACHES: dict[str, Any] = {
    "teacache": TeaCacheConfig,
    "first-block": FirstBlockCacheConfig,
    "taylorseer": TaylorSeerCacheConfig,
    "magcache": MagCacheConfig,
}
"""Names of step caches in a method's settings -> their config classes."""


@dataclass(frozen=True)
class Method:
    """One point of a speed-quality curve, as plain data.

    Attributes:
        name: Unique; also a folder name.
        kind: The curve it lies on.
        steps: Denoising steps.
        reference: Denoising steps of the plain run it is compared with.
        settings: Arguments of :func:`ddit_rt.accelerate` with ``cache`` as a mapping such as
            ``{"type": "teacache", "threshold": 0.4}``; or ``{"peer": {"type": "dbcache", ...}}`` for another library
            (:data:`~ddit_rt.evaluate.baselines.dbcache.PEERS`) with its options; None for the plain pipeline.
    """

    name: str
    kind: str
    steps: int
    reference: int
    settings: Mapping[str, Any] | None = None

    @property
    def is_reference(self) -> bool:
        return self.settings is None and self.steps == self.reference

    @property
    def peer(self) -> Mapping[str, Any] | None:
        """Type and options of the other library that the method runs; None for methods of our own."""
        return self.settings.get("peer") if self.settings is not None else None

    def arguments(self) -> dict[str, Any] | None:
        """The settings for :func:`~ddit_rt.evaluate.outcome.generate`, with the cache's config made.

        Raises:
            ConfigError: an unknown cache or peer.
        """
        if self.settings is None:
            return None
        settings = dict(self.settings)
        if "peer" in settings:
            check_settings(self.name, settings)
            return settings
        if isinstance(settings.get("cache"), Mapping):
            cache = dict(settings["cache"])
            kind = cache.pop("type", None)
            if kind not in CACHES:
                raise ConfigError(f"{self.name}: cache type {kind!r} is none of {', '.join(CACHES)}.")
            if kind == "taylorseer":
                # diffusers would keep the factors in bfloat16, which a float32 model need not suffer
                cache.setdefault("taylor_factors_dtype", torch.float32)
            settings["cache"] = CACHES[kind](**cache)
        return settings

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _fixed(name: str, kind: str, steps: int, schedule: Sequence[int], **settings: Any) -> Method:
    return Method(f"{name}@{steps}", kind, steps, steps, {"schedule": list(schedule), **settings})


def fixed_methods(steps: int, full: bool = True) -> list[Method]:
    """What needs no calibration: the plain pipeline, fewer steps, and fixed schedules.

    Args:
        steps: Of the plain run.
        full: False for the few that a second step count is shown with.
    """
    methods = [Method(f"base@{steps}", "base", steps, steps)]
    for fewer in dict.fromkeys(round(steps / share) for share in ((2, 3, 4) if full else (2, 3))):
        methods.append(Method(f"{fewer}-steps@{steps}", "fewer steps", fewer, steps))
    for n in (2, 3, 4, 6) if full else (2, 3):
        methods.append(_fixed(f"extrapolate-{n}", "linear extrapolation", steps, one_in(steps, n, 0)))
    for n in (3,) if full else ():
        reuse = [2 if k == 0 else k for k in one_in(steps, n, 0)]
        methods.append(_fixed(f"reuse-{n}", "reuse", steps, reuse, coarse="reuse"))
        methods.append(_fixed(f"naive-{n}", "naive 2p", steps, one_in(steps, n, 2), coarse="naive"))
        methods.append(_fixed(f"band-split-{n}", "band-split 2p", steps, one_in(steps, n, 2), coarse="band-split"))
    for n in (3, 6) if full else (2,):
        methods.append(_fixed(f"delta-2p-{n}", "delta 2p", steps, one_in(steps, n, 2), coarse="delta"))
    for n in (3, 6) if full else (3,):
        methods.append(_fixed(f"delta-4p-{n}", "delta 4p", steps, one_in(steps, n, 4), coarse="delta"))
    for text in ("100400", "10400400") if full else ("1040",):
        cycle = [int(letter) for letter in text]
        methods.append(_fixed(f"mix-{text}", "mixed", steps, pattern(steps, cycle), coarse="delta"))
    return methods


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
        _fixed(f"{name}-{label}", kind, steps, found, coarse=coarse, **settings) for label, found in schedules.items()
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
    methods = [_fixed(f"adapter-{name}", "adapter", steps, pattern(steps, cycles[name]), **run) for name in cycles]
    for method in fitted:
        assert method.settings is not None
        settings = {**method.settings, **run}
        methods.append(Method(f"adapter-{method.name}", "adapter, fitted", steps, steps, settings))
    return methods


def cache_methods(
    steps: int,
    teacache: Mapping[str, float],
    coefficients: Sequence[float] | None = None,
    first_block: Sequence[float] = (0.1, 0.2),
    taylorseer: Sequence[int] = (3, 5),
) -> list[Method]:
    """The step caches that people already use, over their thresholds or intervals.

    Args:
        teacache: Label -> threshold.
        coefficients: Of TeaCache; None for the published ones.
        first_block: Thresholds of FirstBlockCache.
        taylorseer: Steps from one full computation to the next; in diffusers' lite mode, which predicts the
            transformer's output and skips all blocks.
    """
    shared = {"coefficients": list(coefficients)} if coefficients is not None else {}

    def cached(name: str, kind: str, **cache: Any) -> Method:
        return Method(f"{name}@{steps}", kind, steps, steps, {"multiples": [1], "threshold": 0.0, "cache": cache})

    return [
        *(
            cached(f"teacache-{label}", "TeaCache", type="teacache", threshold=threshold, **shared)
            for label, threshold in teacache.items()
        ),
        *(cached(f"first-block-{t:g}", "FirstBlockCache", type="first-block", threshold=t) for t in first_block),
        *(
            cached(f"taylorseer-{n}", "TaylorSeer", type="taylorseer", cache_interval=n, use_lite_mode=True)
            for n in taylorseer
        ),
    ]


def dbcache_methods(steps: int, blocks: int, thresholds: Sequence[float] = (0.08, 0.12, 0.24)) -> list[Method]:
    """cache-dit's DBCache over its threshold, with its defaults as far as they fit.

    Args:
        blocks: Transformer blocks of the model.
        thresholds: ``residual_diff_threshold``; cache-dit's default is 0.08.
    """
    # the first 8 blocks always run by default, a seventh of FLUX, but all there is in a small model
    fitted = {"Fn_compute_blocks": 8 if blocks >= 24 else 1, "max_warmup_steps": min(8, steps // 3)}
    return [
        Method(
            f"dbcache-{threshold:g}@{steps}",
            "DBCache",
            steps,
            steps,
            {"peer": {"type": "dbcache", "residual_diff_threshold": threshold, **fitted}},
        )
        for threshold in thresholds
    ]


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


def read_methods(path: str | Path) -> list[Method]:
    """Methods from a JSON file: a list of the fields of :class:`Method`.

    Raises:
        ConfigError: the file is missing, or an entry lacks a field or has one too many.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return check_methods([Method(**entry) for entry in entries])
    except FileNotFoundError:
        raise ConfigError(f"methods={str(path)!r}: there is no such file.") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"methods={str(path)!r}: {error}.") from None


def check_methods(methods: Sequence[Method]) -> list[Method]:
    """Every name once, and a plain reference run for every method.

    Raises:
        ConfigError: names the offending method.
    """
    names = [method.name for method in methods]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ConfigError(f"method names have to be unique: {', '.join(sorted(doubled))}.")
    references = {method.steps for method in methods if method.is_reference}
    for method in methods:
        if method.reference not in references:
            raise ConfigError(f"{method.name} is compared with {method.reference} plain steps, which no method runs.")
        method.arguments()
    return list(methods)
