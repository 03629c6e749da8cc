"""Step caches that a pipeline is accelerated with: TeaCache, or one of diffusers' own; one state per call and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config import TeaCacheConfig
from ..errors import ConfigError
from ..families import Family
from ..runtime import CacheState, TeaCache
from .call_state import CallState
from .executor import Cached, Forwards


class StepCaches:
    """The caches of a pipeline's transformers.

    Args:
        setting: Of ``DDiTConfig.cache``: a :class:`TeaCacheConfig`, a configuration of diffusers', or None.
        family: Of the transformers.
        modules: Component name -> transformer.
    """

    def __init__(self, setting: Any, family: Family, modules: Mapping[str, nn.Module]) -> None:
        self._setting = setting
        self._family = family
        self._modules = modules
        self._teacaches: dict[int, TeaCache] = {}
        self._foreign = setting is not None and not isinstance(setting, TeaCacheConfig)

    def check(self) -> None:
        """Refuses a transformer that has a cache already.

        Raises:
            ConfigError: a cache is to be enabled where there is one.
        """
        for name, module in self._modules.items():
            if self._foreign and module.is_cache_enabled:
                raise ConfigError(
                    f"cache={self._setting!r}: {name} has a cache already. Call pipe.{name}.disable_cache() first, "
                    "or leave cache=None to keep that one."
                )

    def enable(self) -> None:
        """Puts the caches on."""
        if isinstance(self._setting, TeaCacheConfig):
            for module in map(unwrap_module, self._modules.values()):
                self._teacaches[id(module)] = TeaCache(
                    self._setting, self._family.trunk(module), module, self._family.bind
                )
        elif self._foreign:
            for module in self._modules.values():
                module.enable_cache(self._setting)  # type: ignore[operator]

    def disable(self) -> None:
        """Takes off what :meth:`enable` put on."""
        if self._foreign:
            for module in self._modules.values():
                if module.is_cache_enabled:
                    module.disable_cache()  # type: ignore[operator]

    def reset(self) -> None:
        """Forgets what diffusers' caches remember of the last call."""
        for module in self._modules.values():
            if getattr(module, "is_cache_enabled", False):
                module._reset_stateful_cache()  # type: ignore[operator]

    def forwards(self, run: CallState, base: nn.Module, inner: Callable[..., Any], ordinal: int) -> Forwards:
        """Multiple -> the forward to call, in the context of diffusers' cache if there is one.

        A cache keeps one state per model call and multiple: residuals of different token counts never meet. A probe,
        which runs the coarse model at an earlier step's latent, has a state of its own.

        Args:
            run: The pipeline call.
            base: The transformer.
            inner: Its forward.
            ordinal: Of the transformer's call within the step.
        """
        step, sigma = run.index, run.sigma

        def at(multiple: int) -> Callable[..., Any]:
            probe = run.index != step

            def in_context(*args: Any, **kwargs: Any) -> Any:
                name = f"call{ordinal}@{multiple}{'-probe' if probe else ''}"
                with base.cache_context(name, step_index=step, sigma=sigma, num_inference_steps=run.steps):  # type: ignore[operator]
                    return inner(*args, **kwargs)

            return in_context if getattr(base, "is_cache_enabled", False) else inner

        return at

    def teacache(self, run: CallState, base: nn.Module, ordinal: int) -> Cached | None:
        """Multiple -> the rule and what it remembers for this call of the step; None without TeaCache."""
        teacache = self._teacaches.get(id(base))
        if teacache is None:
            return None
        return lambda multiple: (teacache, run.cache_states.setdefault((id(base), ordinal, multiple), CacheState()))
