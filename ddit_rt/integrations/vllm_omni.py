"""vLLM-Omni: what its diffusers adapter loads is accelerated, by environment variables or as ``--cache-backend ddit``.

Verified with vllm-omni 0.30.0. The entry point ``vllm_omni.general_plugins`` calls :func:`register` in every process,
maybe more than once. Without any patch of the engine there is
:class:`ddit_rt.integrations.vllm_omni_pipeline.DDiTDiffusersPipeline`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..config import DDiTConfig
from ..errors import DDiTError
from .settings import PluginSettings, settings_from_environment

logger = logging.getLogger(__name__)

BACKEND = "ddit"
"""Name of the cache back-end, and of a request's settings in its ``extra_args``."""

ENGINE = "vLLM-Omni"
_MARK = "_ddit_rt"
_RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"


def register() -> None:
    """Puts the plug-in into this process; the entry point's callable.

    A second call changes nothing. What stands against it is logged, and the engine runs plain.
    """
    try:
        settings = settings_from_environment()
    except DDiTError as error:
        logger.error("ddit_rt NOT APPLIED, %s runs plain: %s", ENGINE, error)
        return
    from vllm_omni.diffusion.cache import selector
    from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline

    if hasattr(selector.get_cache_backend, _MARK):
        return
    wanted = (selector, "get_cache_backend"), *((DiffusersAdapterPipeline, name) for name in _OF_ADAPTER)
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in wanted if not hasattr(owner, name)]
    if missing:
        logger.error("ddit_rt NOT APPLIED: this %s has no %s", ENGINE, ", ".join(missing))
        return
    choose = _choosing_ours(selector.get_cache_backend, settings)
    selector.get_cache_backend = choose
    runner = sys.modules.get(_RUNNER)
    if runner is not None:  # it has taken the name already; imported later, it takes ours
        runner.get_cache_backend = choose  # type: ignore[attr-defined]
    for name, wrap in _OF_ADAPTER.items():
        setattr(DiffusersAdapterPipeline, name, wrap(getattr(DiffusersAdapterPipeline, name), settings))
    if settings is None:
        logger.warning("ddit_rt is installed and waits for --cache-backend ddit: no DDIT_* variable is set")
    else:
        logger.warning("ddit_rt will accelerate what %s's diffusers adapter loads, nothing else", ENGINE)


def settings_of_cache(cache_config: Any, environment: PluginSettings | None) -> PluginSettings:
    """What ``--cache-config`` asks for, over what the environment does.

    Args:
        cache_config: Its mapping, or the engine's ``DiffusionCacheConfig`` made of it.
        environment: As of :func:`ddit_rt.integrations.settings.settings_from_environment`.

    Raises:
        ConfigError: an unknown name, or a value out of range.
        ScheduleError: a schedule that cannot be run.
    """
    # the engine's class keeps names that are not its own apart
    given = cache_config if isinstance(cache_config, Mapping) else getattr(cache_config, "_extra_params", None)
    try:
        return (environment or PluginSettings(DDiTConfig())).replace(given or {})
    except DDiTError as error:
        raise type(error)(f"--cache-config: {error}") from None


def run_adapter(adapter: Any, batch: Any, forward: Callable[[], Any]) -> Any:
    """Runs what the adapter's ``forward`` is given, by the settings in the request's ``extra_args`` if it has some.

    Raises:
        ConfigError, ScheduleError: settings that cannot be run; the engine makes an error of the request.
    """
    from .acceleration import run_request, steps_of_call

    sampling = batch.sampling_params
    wanted = (sampling.extra_args or {}).get(BACKEND)
    # the adapter passes on what is not None, over the defaults that the engine was started with
    given = {**adapter.od_config.diffusers_call_kwargs, **{k: v for k, v in vars(sampling).items() if v is not None}}
    pipe = adapter._pipeline
    result, facts = run_request(pipe, wanted, steps_of_call(pipe, given), forward)
    if facts is not None:
        logger.info("ddit_rt: request %s: %s", getattr(batch, "request_id", "?"), facts)
    return result


def _choosing_ours(choose: Callable[..., Any], settings: PluginSettings | None) -> Callable[..., Any]:
    @functools.wraps(choose)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend != BACKEND:
            return choose(cache_backend, cache_config)
        return _backend_class()(cache_config, settings_of_cache(cache_config, settings))

    setattr(get_cache_backend, _MARK, True)
    return get_cache_backend


@functools.cache
def _backend_class() -> type[Any]:
    from vllm_omni.diffusion.cache.base import CacheBackend

    class DDiTCacheBackend(CacheBackend):
        """Accelerates the pipeline of the diffusers adapter, as the engine enables its caches: after compilation."""

        def __init__(self, config: Any, settings: PluginSettings) -> None:
            super().__init__(config)
            self._settings = settings

        def enable(self, pipeline: Any) -> None:
            from .acceleration import accelerate_for

            inner = getattr(pipeline, "_pipeline", None)
            if inner is None:
                logger.warning(
                    "ddit_rt NOT APPLIED: %s is %s's own model, not a pipeline of diffusers; start with "
                    "--diffusion-load-format diffusers",
                    type(pipeline).__name__,
                    ENGINE,
                )
                return
            self.enabled = accelerate_for(ENGINE, inner, self._settings)

        def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
            """Nothing is left to do: every call of the pipeline begins afresh."""

    return DDiTCacheBackend


def _wrap_load(load: Callable[..., Any], settings: PluginSettings | None) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        # with the cache back-end the engine accelerates later, by the cache's settings
        if settings is not None and self.od_config.cache_backend != BACKEND and not _accelerates_itself(self):
            from .acceleration import accelerate_for

            accelerate_for(ENGINE, self._pipeline, settings)
        return result

    return load_weights


def _wrap_forward(forward: Callable[..., Any], settings: PluginSettings | None) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_request(self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
        if _accelerates_itself(self):
            return forward(self, req, *args, **kwargs)
        return run_adapter(self, req, lambda: forward(self, req, *args, **kwargs))

    return forward_request


def _wrap_refusal(refuse: Callable[..., Any], settings: PluginSettings | None) -> Callable[..., Any]:
    @functools.wraps(refuse)
    def raise_unsupported(self: Any) -> None:
        """The adapter takes no cache, since those reach into its model's blocks; ours goes around the pipeline."""
        config = self.od_config
        if config.cache_backend != BACKEND:
            return refuse(self)
        settings_of_cache(config.cache_config, settings)  # before anything is loaded
        config.cache_backend = "none"
        try:
            return refuse(self)
        finally:
            config.cache_backend = BACKEND

    return raise_unsupported


def _accelerates_itself(adapter: Any) -> bool:
    """Whether an adapter is our own pipeline class, which stands on the patched one."""
    return getattr(adapter, "accelerates_itself", False)


_OF_ADAPTER = {
    "load_weights": _wrap_load,
    "forward": _wrap_forward,
    "_raise_unsupported_features": _wrap_refusal,
}
