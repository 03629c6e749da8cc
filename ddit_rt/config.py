"""The settings of an accelerated pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError, ScheduleError

ScheduleFn = Callable[[int, Mapping[int, float]], int]

SUPPORTED_MULTIPLES = (1, 2, 4)
SKIP = 0  # in a schedule, a step that makes no model call
COARSE_PATHS = ("auto", "adapter", "adapter-delta", "delta", "band-split", "naive", "extrapolate", "reuse")
POSITIONS = ("auto", "native", "interpolated")
BACKENDS = ("auto", "triton", "torch")
# caches of diffusers, by whether they work while the token count changes
CACHE_CONFIGS = ("FirstBlockCacheConfig", "TaylorSeerCacheConfig", "MagCacheConfig")
FINE_CACHE_CONFIGS = ("SeaCacheConfig", "PyramidAttentionBroadcastConfig", "FasterCacheConfig")


@dataclass(frozen=True)
class TeaCacheConfig:
    """Settings of TeaCache (arXiv 2411.19108): skip the blocks while their input hardly changes.

    Args:
        threshold: Accumulated change at which the blocks run again; None takes the published value for twice the speed
            (FLUX 0.4; Wan 1.3B 0.08, 14B 0.2). More is faster and less faithful.
        coefficients: Of the polynomial that maps the input's relative change to the output's, highest order first; None
            takes those published for the model. ``ddit_rt.evaluate.fit_teacache`` finds them for another one.
        retention: The published variant for Wan that computes the first five steps and watches another signal.

    Raises:
        ConfigError: a value is out of range.
    """

    threshold: float | None = None
    coefficients: tuple[float, ...] | None = None
    retention: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None and (not _is_number(self.threshold) or not self.threshold >= 0):
            raise ConfigError(f"TeaCacheConfig.threshold={self.threshold!r}: a number >= 0, or None.")
        if self.coefficients is not None:
            object.__setattr__(self, "coefficients", tuple(self.coefficients))
            if not self.coefficients or not all(map(_is_number, self.coefficients)):
                raise ConfigError(
                    f"TeaCacheConfig.coefficients={self.coefficients!r}: finite numbers, highest order first."
                )


@dataclass(frozen=True)
class DDiTConfig:
    """How an accelerated pipeline chooses and runs its patch sizes.

    Args:
        multiples: Patch sizes the policy may choose, as multiples of the model's own patch ``p``; holds 1.
        threshold: τ of the paper's equation 5, in latent units. A size is smooth enough when the ρ-quantile of its
            per-patch standard deviations lies below τ. 0 keeps every step at the finest size. The paper's 1e-3 is
            for FLUX and Wan latents at 50 steps; ``ddit-rt calibrate`` finds the value for another model or step count.
        quantile: ρ in [0, 1], the share of patches that have to be smooth.
        order: n of the n-th finite difference of the latent, 1 to 3. The first ``order`` steps run at multiple 1.
        schedule: Overrides the policy: a sequence of multiples, one per denoising step, or a callable
            ``(step index, {multiple: sigma_k}) -> multiple``. A 0 makes no model call: its prediction lies on the
            straight line through the last two that the model made.
        coarse: What a coarse step computes. ``"delta"``: band-split, the coarse model supplying only the change since
            the last full step; ``"band-split"``: without that anchor; ``"naive"``: PI-resized embeddings and nothing
            else; ``"adapter"``: the trained adapter; ``"adapter-delta"``: the trained adapter, supplying only the
            change; ``"extrapolate"`` and ``"reuse"``: the baselines that make no model call. ``"auto"``: adapter if one
            is given, else delta.
        residual: With the two deltas: ``"constant"`` keeps the residual of the last full step, ``"linear"``
            extrapolates it from the last two.
        high_band: With ``"delta"``, what coarse tokens cannot see: ``"line"`` follows the straight line through the
            last two full predictions, ``"clean"`` is the noise left over the clean latent of the last one.
        positions: Coordinates of coarse tokens: ``"native"`` (as in a picture k times smaller) or ``"interpolated"``
            (centres of the coarse patches on the full grid). ``"auto"``: interpolated for naive, an adapter as
            it was trained, else native.
        max_consecutive_coarse: Longest run of coarse steps the policy may make before a full step refreshes it; None:
            no limit. ``"auto"``: 2 where coarse steps lean on the last full one without training (delta, extrapolate,
            reuse), the longest it was trained for with an adapter that has a memory, else no limit. Explicit schedules
            are taken as they are.
        initial_full_steps: First steps that the policy leaves full, at least the ``order`` steps that fill its history:
            a share of the run's steps if below 1, else their number. Early predictions change most while the latent, in
            small steps, shows little of it.
        skip_below: The policy makes a step without a model call when σ_k of every size lies below this share of τ; 0:
            never.
        max_consecutive_skipped: Longest run of such steps.
        backend: Kernels: ``"triton"``, ``"torch"`` or ``"auto"``.
        cuda_graphs: Run every size from a captured CUDA graph: ``"auto"`` on CUDA devices, True also insists on one,
            False never. What cannot be captured runs eagerly, and the log says why.
        max_graphs: Most graphs to keep, one per size and signature of the inputs; the least recently used goes first.
        merge_adapter: Merge the adapter's LoRA into copies of the layers' weights, one per coarse size: nothing to
            compute beside the model, for memory (FLUX.1-dev, bf16: 12 GB per size). Layers that are quantised, hooked
            or have a user's LoRA keep ours beside them.
        cache: A step cache to combine with: ``"teacache"``, a :class:`TeaCacheConfig`, or a cache config of diffusers
            (``FirstBlockCacheConfig``, ``TaylorSeerCacheConfig``, ``MagCacheConfig``), which keeps a state per patch
            size; diffusers' other caches need ``multiples=(1,)``. The report counts what TeaCache skips, not what
            diffusers' caches skip inside the transformer. None for none.

    Raises:
        ConfigError: a value is out of range.
        ScheduleError: ``schedule`` is neither a callable nor a sequence of the multiples above.
    """

    multiples: tuple[int, ...] = (1, 2, 4)
    threshold: float = 1e-3
    quantile: float = 0.4
    order: int = 3
    schedule: Sequence[int] | ScheduleFn | None = None
    coarse: str = "auto"
    residual: str = "linear"
    high_band: str = "line"
    positions: str = "auto"
    max_consecutive_coarse: int | str | None = "auto"
    initial_full_steps: float = 0.125
    skip_below: float = 0.0
    max_consecutive_skipped: int = 2
    backend: str = "auto"
    cuda_graphs: bool | str = "auto"
    max_graphs: int = 24
    merge_adapter: bool = False
    cache: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiples", _checked_multiples(self.multiples))
        if not _is_number(self.threshold) or not self.threshold >= 0:
            raise ConfigError(f"threshold={self.threshold!r}: τ is a number >= 0 (0 keeps every step full).")
        if not _is_number(self.quantile) or not 0 <= self.quantile <= 1:
            raise ConfigError(f"quantile={self.quantile!r}: ρ is a share of the patches, a number in [0, 1].")
        if not _is_whole(self.order) or self.order not in (1, 2, 3):
            raise ConfigError(f"order={self.order!r}: the finite difference has order 1, 2 or 3.")
        _one_of("coarse", self.coarse, COARSE_PATHS)
        _one_of("residual", self.residual, ("constant", "linear"))
        _one_of("high_band", self.high_band, ("line", "clean"))
        _one_of("positions", self.positions, POSITIONS)
        _one_of("backend", self.backend, BACKENDS)
        limit = self.max_consecutive_coarse
        if limit not in ("auto", None) and (isinstance(limit, str) or not _is_whole(limit) or limit < 1):
            raise ConfigError(f"max_consecutive_coarse={limit!r}: a whole number >= 1, None for no limit, or 'auto'.")
        if not _is_number(self.skip_below) or not self.skip_below >= 0:
            raise ConfigError(f"skip_below={self.skip_below!r}: a number >= 0 (0 makes no skipped steps).")
        if (
            not _is_number(self.initial_full_steps)
            or self.initial_full_steps < 0
            or (self.initial_full_steps > 1 and self.initial_full_steps != int(self.initial_full_steps))
        ):
            raise ConfigError(
                f"initial_full_steps={self.initial_full_steps!r}: a share of the steps below 1, or their whole number."
            )
        if not _is_whole(self.max_consecutive_skipped) or self.max_consecutive_skipped < 1:
            raise ConfigError(f"max_consecutive_skipped={self.max_consecutive_skipped!r}: a whole number >= 1.")
        for name in ("threshold", "quantile", "skip_below"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "order", int(self.order))
        if self.cuda_graphs not in ("auto", True, False):
            raise ConfigError(f"cuda_graphs={self.cuda_graphs!r}: use 'auto', True or False.")
        if not isinstance(self.max_graphs, int) or self.max_graphs < 1:
            raise ConfigError(f"max_graphs={self.max_graphs!r}: a whole number >= 1.")
        if not isinstance(self.merge_adapter, bool):
            raise ConfigError(f"merge_adapter={self.merge_adapter!r}: use True or False.")
        object.__setattr__(self, "cache", _checked_cache(self.cache, self.multiples))
        if self.schedule is not None and not callable(self.schedule):
            object.__setattr__(self, "schedule", _checked_schedule(self.schedule, self.multiples))

    @classmethod
    def make(cls, config: DDiTConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> DDiTConfig:
        """Joins a config (object, mapping or None for the defaults) with keyword overrides.

        Raises:
            ConfigError: an unknown name, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        values = dict(config) if isinstance(config, Mapping) else {}
        if config is not None and not isinstance(config, Mapping | cls):
            raise ConfigError(f"config={config!r}: pass a DDiTConfig, a mapping of its fields, or None.")
        for name in (*values, *overrides):
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}: DDiTConfig has {', '.join(sorted(known))}.")
        base = config if isinstance(config, cls) else cls(**values)
        return replace(base, **overrides) if overrides else base

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a callable schedule is given by its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.cache is not None:
            values["cache"] = repr(self.cache)
        if callable(self.schedule):
            values["schedule"] = getattr(self.schedule, "__qualname__", repr(self.schedule))
        return values


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(map(repr, allowed))}.")


def _checked_multiples(multiples: Any) -> tuple[int, ...]:
    values = tuple(multiples) if isinstance(multiples, Iterable) else ()
    known = all(_is_whole(k) and k in SUPPORTED_MULTIPLES for k in values)
    if not known or 1 not in values or len(set(values)) < len(values):
        raise ConfigError(f"multiples={multiples!r}: take distinct values from {SUPPORTED_MULTIPLES}, 1 among them.")
    return tuple(sorted(int(k) for k in values))


def _checked_schedule(schedule: object, multiples: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(schedule, str) or not isinstance(schedule, Sequence):
        raise ScheduleError(
            f"schedule={schedule!r}: pass one multiple per step, as in [1, 1, 1, 2, 4], or a callable "
            "(step index, {multiple: sigma}) -> multiple."
        )
    for index, multiple in enumerate(schedule):
        if not _is_whole(multiple) or (multiple != SKIP and multiple not in multiples):
            raise ScheduleError(
                f"schedule[{index}]={multiple!r} is not among multiples={multiples}, nor {SKIP} for no model call."
            )
    return tuple(int(multiple) for multiple in schedule)


def _checked_cache(cache: object, multiples: tuple[int, ...]) -> object:
    if cache is None or isinstance(cache, TeaCacheConfig):
        return cache
    if cache == "teacache":
        return TeaCacheConfig()
    name = type(cache).__name__
    if name not in CACHE_CONFIGS + FINE_CACHE_CONFIGS:
        known = ", ".join(("'teacache'", "TeaCacheConfig", *CACHE_CONFIGS, *FINE_CACHE_CONFIGS))
        raise ConfigError(f"cache={cache!r}: use None or one of {known}.")
    if name in FINE_CACHE_CONFIGS and multiples != (1,):
        raise ConfigError(
            f"cache={name} works at one token count only, which mixed patch sizes break. Set "
            f"multiples=(1,), or take 'teacache' or one of {', '.join(CACHE_CONFIGS)}."
        )
    return cache
