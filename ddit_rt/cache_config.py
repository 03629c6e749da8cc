"""The step caches that a run can be combined with, and the settings of the one that is ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from .errors import ConfigError
from .settings import Expected, Settings, plain_number, shown

CACHE_CONFIGS = ("FirstBlockCacheConfig", "TaylorSeerCacheConfig", "MagCacheConfig")
"""Caches of diffusers that work while the token count changes."""
FINE_CACHE_CONFIGS = ("SeaCacheConfig", "PyramidAttentionBroadcastConfig", "FasterCacheConfig")
"""Those that do not."""


class TeaCacheConfig(Settings):
    """Settings of TeaCache (arXiv 2411.19108): skip the blocks while their input hardly changes.

    Raises:
        ConfigError: a value is out of range.
    """

    prefix: ClassVar[str] = "TeaCacheConfig."

    threshold: Annotated[float | None, Field(ge=0), Expected("a number >= 0, or None.")] = None
    """Accumulated change at which the blocks run again; None takes the published value for twice the speed (FLUX 0.4;
    Wan 1.3B 0.08, 14B 0.2). More is faster and less faithful."""
    coefficients: Annotated[
        tuple[float, ...] | None,
        Field(min_length=1),
        BeforeValidator(lambda given: tuple(map(plain_number, given)) if isinstance(given, Iterable) else given),
        Expected("finite numbers, highest order first."),
    ] = None
    """Of the polynomial that maps the input's relative change to the output's, highest order first; None takes those
    published for the model. ``ddit_rt.evaluate.fit_teacache`` finds them for another one."""
    retention: Annotated[bool, Expected("use True or False.")] = False
    """The published variant for Wan that computes the first five steps and watches another signal."""

    def __init__(
        self,
        threshold: float | None = None,
        coefficients: Iterable[float] | None = None,
        retention: bool = False,
    ) -> None:
        super().__init__(threshold=threshold, coefficients=coefficients, retention=retention)


def checked_cache(cache: Any, one_size: bool) -> Any:
    """A cache as settings take it; text and mappings become a :class:`TeaCacheConfig`.

    Args:
        cache: What was given.
        one_size: Every step of a run has the same number of tokens.

    Raises:
        ConfigError: it is none that is known, or none for runs of several sizes.
    """
    if cache is None or isinstance(cache, TeaCacheConfig):
        return cache
    if isinstance(cache, str) and cache == "teacache":
        return TeaCacheConfig()
    if isinstance(cache, Mapping) and cache.get("type") == "teacache":
        options = {name: value for name, value in cache.items() if name != "type"}
        TeaCacheConfig.check_names(options)
        return TeaCacheConfig(**options)
    kind = type(cache).__name__
    if kind not in CACHE_CONFIGS + FINE_CACHE_CONFIGS:
        known = ", ".join(("'teacache'", "TeaCacheConfig", *CACHE_CONFIGS, *FINE_CACHE_CONFIGS))
        raise ConfigError(
            f"cache={shown(cache)}: use None or one of {known}. As a mapping it is {{'type': 'teacache', 'threshold': "
            "0.4}; diffusers' caches are objects, which only Python can pass."
        )
    if kind in FINE_CACHE_CONFIGS and not one_size:
        raise ConfigError(
            f"cache={kind} works at one token count only, which mixed patch sizes break. Set "
            f"multiples=(1,), or take 'teacache' or one of {', '.join(CACHE_CONFIGS)}."
        )
    return cache


CACHE_SCHEMA = {
    "anyOf": [
        {"const": "teacache"},
        {
            "type": "object",
            "properties": {"type": {"const": "teacache"}, **TeaCacheConfig.model_json_schema()["properties"]},
            "required": ["type"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
"""Of ``cache`` in a settings file."""
