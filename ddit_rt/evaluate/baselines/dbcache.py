"""DBCache of cache-dit: the blocks after the first few are skipped while those few change little.

cache-dit also asks for torch>=2.7.1 and diffusers>=0.36; verified with 1.5.3.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ...errors import ConfigError
from ...families import denoisers, family_of
from ..methods import Method
from .base import Listing
from .other_library import Cached, Library

_COUNTS = ("Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps")


class DBCache(Library):
    """Over ``residual_diff_threshold`` (cache-dit's default is 0.08), with its defaults as far as they fit."""

    name = "dbcache"
    module, title = "cache_dit", "cache-dit"

    def methods(self, listing: Listing) -> list[Method]:
        steps = listing.steps
        # the first 8 blocks always run by default, a seventh of FLUX, but all there is in a small model
        first = 8 if block_count(listing.pipe) >= 24 else 1
        fitting = {"Fn_compute_blocks": first, "max_warmup_steps": min(8, steps // 3)}
        return [
            Method(
                f"dbcache-{threshold:g}@{steps}",
                "DBCache",
                steps,
                steps,
                {"library": {"type": self.name, "residual_diff_threshold": threshold, **fitting}},
            )
            for threshold in ((0.08, 0.12, 0.24) if listing.full else (0.12,))
        ]

    def check(self, where: str, options: Mapping[str, Any]) -> None:
        # cache-dit itself looks at no value
        threshold = options.get("residual_diff_threshold", 0.0)
        if not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ConfigError(f"{where}: residual_diff_threshold={threshold!r}: a number >= 0.")
        for name in _COUNTS:
            count = options.get(name, 0)
            if not isinstance(count, int) or count < 0:
                raise ConfigError(f"{where}: {name}={count!r}: a whole number >= 0.")

    def check_with_library(self, options: Mapping[str, Any]) -> None:
        self._config(options)

    @contextmanager
    def put_on(self, pipe: Any, options: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[Cached]:
        cache_dit = importlib.import_module(self.module)
        # its own default goes by the pipeline's class, not by whether this call has a negative prompt
        config = self._config({"enable_separate_cfg": runs_twice(pipe, call), **options})
        blocks = block_count(pipe)
        if config.Fn_compute_blocks + config.Bn_compute_blocks >= blocks:
            raise ConfigError(
                f"Fn_compute_blocks={config.Fn_compute_blocks} and Bn_compute_blocks={config.Bn_compute_blocks} leave "
                f"nothing to skip of {blocks} blocks."
            )
        modules = list(denoisers(pipe, family_of(pipe)).values())

        def cached() -> float | None:
            steps = 0.0
            for module in modules:
                stats = cache_dit.summary(module, logging=False)[-1]
                branches = [stats.cached_steps, stats.cfg_cached_steps][: 2 if config.enable_separate_cfg else 1]
                steps += sum(map(len, branches)) / len(branches)
            return steps

        with _quiet(self.module):
            try:
                cache_dit.enable_cache(pipe, cache_config=config)
                yield cached
            finally:
                cache_dit.disable_cache(pipe)

    def _config(self, options: Mapping[str, Any]) -> Any:
        return importlib.import_module(self.module).DBCacheConfig(**options)


def block_count(pipe: Any) -> int:
    """Transformer blocks of a pipeline's denoiser, of the smaller one where it has two."""
    modules = [unwrap_module(module) for module in denoisers(pipe, family_of(pipe)).values()]
    return min(sum(len(child) for child in m.children() if isinstance(child, nn.ModuleList)) for m in modules)


def runs_twice(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Whether every step of a call runs the transformer once for the prompt and once for the negative prompt."""
    defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
    given = {**defaults, **call}
    if "true_cfg_scale" not in given:
        return given["guidance_scale"] > 1
    negative = any(given.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    return negative and given["true_cfg_scale"] > 1


@contextmanager
def _quiet(package: str) -> Iterator[None]:
    """Keeps a package from logging anything below errors, as every switch would into the progress bar."""
    known = logging.root.manager.loggerDict.items()
    loggers = [log for name, log in known if name.split(".")[0] == package and isinstance(log, logging.Logger)]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        yield
    finally:
        for log, level in zip(loggers, levels):
            log.setLevel(level)
