"""Step caches that a pipeline is accelerated with: TeaCache, or one of diffusers' own; one state per call and size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import CacheMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..cache_config import CACHE_CONFIGS, TeaCacheConfig
from ..errors import ConfigError
from ..families import Family
from ..runtime import CacheState, TeaCache
from .call_state import CallState

# hooks of diffusers' caches that hold activations of one token count
_ONE_COUNT = frozenset(
    {
        "pyramid_attention_broadcast",
        "faster_cache_denoiser",
        "faster_cache_block",
        "sea_cache_block",
        "text_kv_cache_block",
    }
)
# in diffusers 0.37 a context takes its name alone
_TAKES_STEPS = inspect.getfullargspec(CacheMixin.cache_context).varkw is not None


class StepCaches:
    """The caches of a pipeline's transformers.

    Args:
        setting: Of ``DDiTConfig.cache``: a :class:`TeaCacheConfig`, a configuration of diffusers', or None.
        family: Of the transformers.
        modules: Component name -> transformer.

    Attributes:
        teacaches: Transformer, by id -> TeaCache's rule for it; empty without TeaCache.
        obstacles: Transformer, by id -> why it cannot run coarsely: a cache that was switched on after accelerate().
    """

    def __init__(self, setting: Any, family: Family, modules: Mapping[str, nn.Module]) -> None:
        self._setting = setting
        self._family = family
        self._modules = modules
        self.teacaches: dict[int, TeaCache] = {}
        self._foreign = setting is not None and not isinstance(setting, TeaCacheConfig)
        self.obstacles: dict[int, str] = {}

    def check(self, mixed: bool) -> None:
        """Refuses a transformer that has a cache which cannot go with ours, or with mixed patch sizes.

        Args:
            mixed: The settings allow steps of several patch sizes.

        Raises:
            ConfigError: naming it.
        """
        for name, module in self._modules.items():
            found = _one_count_cache(unwrap_module(module))
            if found and mixed:
                raise ConfigError(
                    f"{name} has {found} on, which works at one token count only. Call pipe.{name}.disable_cache() "
                    f"first, set multiples=(1,), or take cache='teacache' or one of {', '.join(CACHE_CONFIGS)}."
                )
            if self._foreign and not hasattr(module, "enable_cache"):
                raise ConfigError(
                    f"cache={self._setting!r}: diffusers has no caches for {type(unwrap_module(module)).__name__}. "
                    "Leave cache=None."
                )
            if self._foreign and module.is_cache_enabled:
                raise ConfigError(
                    f"cache={self._setting!r}: {name} has a cache already. Call pipe.{name}.disable_cache() first, "
                    "or leave cache=None to keep that one."
                )

    def enable(self) -> None:
        """Puts the caches on."""
        if isinstance(self._setting, TeaCacheConfig):
            for module in map(unwrap_module, self._modules.values()):
                self.teacaches[id(module)] = TeaCache(
                    self._setting, self._family.trunk(module), module, self._family.bind
                )
        elif self._foreign:
            for module in self._modules.values():
                try:
                    module.enable_cache(self._setting)  # type: ignore[operator]
                except ValueError as error:  # of blocks that a cache does not know
                    raise ConfigError(f"cache={self._setting!r}: {error} Leave cache=None.") from error

    def disable(self) -> None:
        """Takes off what :meth:`enable` put on."""
        if self._foreign:
            for module in self._modules.values():
                if module.is_cache_enabled:
                    module.disable_cache()  # type: ignore[operator]

    def reset(self) -> None:
        """A pipeline call begins: forgets what diffusers' caches remember of the last one, and looks for new ones."""
        for module in self._modules.values():
            base = unwrap_module(module)
            found = "" if self._foreign else _one_count_cache(base)
            self.obstacles[id(base)] = f"{found} works at one token count only" if found else ""
            if getattr(module, "is_cache_enabled", False):
                module._reset_stateful_cache()  # type: ignore[operator]

    def contexts(
        self, call: CallState, base: nn.Module, inner: Callable[..., Any], ordinal: int
    ) -> Callable[[int, bool], Callable[..., Any]]:
        """(Multiple, probe?) -> the forward to call, in the context of diffusers' cache.

        A cache keeps one state per model call and multiple: residuals of different token counts never meet. A probe,
        which runs the coarse model at an earlier step's latent, has a state of its own.

        Args:
            call: The pipeline call.
            base: The transformer.
            inner: Its forward.
            ordinal: Of the transformer's call within the step.
        """
        known = {"step_index": call.index, "sigma": call.sigma, "num_inference_steps": call.steps}
        if not _TAKES_STEPS:
            known = {}

        def at(multiple: int, probe: bool) -> Callable[..., Any]:
            def in_context(*args: Any, **kwargs: Any) -> Any:
                name = f"call{ordinal}@{multiple}{'-probe' if probe else ''}"
                with base.cache_context(name, **known):  # type: ignore[operator]
                    return inner(*args, **kwargs)

            return in_context

        return at

    def teacache(
        self, states: dict[tuple[int, int, int], CacheState], base: nn.Module, ordinal: int
    ) -> Callable[[int], tuple[TeaCache, CacheState]] | None:
        """Multiple -> the rule and what it remembers for this call of the step; None without TeaCache.

        Args:
            states: Of the pipeline call: (transformer, call of the step, multiple) -> what is remembered.
            base: The transformer.
            ordinal: Of the transformer's call within the step.
        """
        teacache = self.teacaches.get(id(base))
        if teacache is None:
            return None
        return lambda multiple: (teacache, states.setdefault((id(base), ordinal, multiple), CacheState()))


def _one_count_cache(base: nn.Module) -> str:
    """Name of a cache of diffusers' on the transformer that works at one token count only; empty if there is none."""
    config = getattr(base, "_cache_config", None)
    if config is not None:
        name = type(config).__name__
        return "" if name in CACHE_CONFIGS else name
    for module in base.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks if registry is not None else ():
            if hook in _ONE_COUNT:
                return str(hook)
    return ""
