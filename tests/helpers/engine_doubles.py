"""Small doubles of what the plug-ins touch in SGLang 0.5.23 and vLLM-Omni 0.30.0, written after their sources.

The names, signatures and orders are the contract; what the engines do beside it is left out. Each function returns the
modules to put into ``sys.modules``; the tests run against the engines themselves, too, where those are installed.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from types import ModuleType
from typing import Any, ClassVar

import torch
from fastapi import FastAPI
from pydantic import BaseModel


def _module(modules: dict[str, ModuleType], name: str, **content: Any) -> None:
    """Adds a module and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        if full not in modules:
            modules[full] = ModuleType(full)
            modules[full].__path__ = []  # type: ignore[attr-defined]
            if depth > 1:
                setattr(modules[".".join(parts[: depth - 1])], parts[depth - 1], modules[full])
    for key, value in content.items():
        setattr(modules[name], key, value)


# -- SGLang ---------------------------------------------------------------------------------------------------------


@dataclass
class Req:
    """A request on its way through the worker."""

    num_inference_steps: int = 8
    height: int = 32
    width: int = 32
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    output: Any = None


def sglang() -> dict[str, ModuleType]:
    class HookType(Enum):
        BEFORE = "before"
        AFTER = "after"
        AROUND = "around"
        REPLACE = "replace"

    class HookRegistry:
        _hooks: ClassVar[dict[str, list[Any]]] = defaultdict(list)

        @classmethod
        def register(cls, target: str, hook: Callable, hook_type: HookType = HookType.AFTER) -> None:
            if isinstance(hook, type) and hook_type != HookType.REPLACE:
                raise TypeError(hook)
            cls._hooks[target].append((hook_type, hook))

        @classmethod
        def apply_hooks(cls) -> None:
            for target, hooks in sorted(cls._hooks.items()):
                path, name = target.rsplit(".", 1)
                owner = pkgutil.resolve_name(path)
                wrapped = getattr(owner, name)
                for hook_type, hook in hooks:
                    wrapped = _hooked(wrapped, hook, hook_type)
                setattr(owner, name, wrapped)

        @classmethod
        def reset(cls) -> None:
            cls._hooks.clear()

    def _hooked(original: Callable, hook: Callable, hook_type: HookType) -> Callable:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if hook_type is HookType.AROUND:
                return hook(original, *args, **kwargs)
            if hook_type is HookType.BEFORE:
                changed = hook(*args, **kwargs)
                if changed is not None:
                    args, kwargs = changed
                return original(*args, **kwargs)
            result = original(*args, **kwargs)
            changed = hook(result, *args, **kwargs)
            return result if changed is None else changed

        return wrapper

    class DiffusersExecutionStage:
        def __init__(self, diffusers_pipe: Any) -> None:
            self.diffusers_pipe = diffusers_pipe
            self.ignored: list[str] = []

        def forward(self, batch: Req, server_args: Any) -> Req:
            kwargs = {name: getattr(batch, name) for name in ("num_inference_steps", "height", "width")}
            kwargs["generator"] = torch.Generator().manual_seed(batch.seed)
            if batch.extra:
                kwargs.update(batch.extra.get("diffusers_kwargs", {}))
            known = set(inspect.signature(self.diffusers_pipe.__call__).parameters)
            self.ignored += [name for name in kwargs if name not in known]
            kwargs = {name: value for name, value in kwargs.items() if name in known}
            kwargs.setdefault("output_type", "pt")
            with torch.no_grad():
                batch.output = self.diffusers_pipe(**kwargs).images.cpu().float()
            return batch

    class DiffusersPipeline:
        def __init__(self, model_path: Any, server_args: Any) -> None:
            self.diffusers_pipe = self._load_diffusers_pipeline(model_path, server_args)

        def _load_diffusers_pipeline(self, model_path: Any, server_args: Any) -> Any:
            return model_path()

    def build_sampling_params(request_id: str, **kwargs: Any) -> dict[str, Any]:
        return kwargs

    def add_common_data_to_response(response: dict, request_id: str, result: Any) -> dict:
        if result.usage is not None:
            response["usage"] = dict(result.usage)
        response["id"] = request_id
        return response

    class Usage(BaseModel):
        prompt_tokens: int | None = None

    class ImageResponse(BaseModel):
        id: str
        usage: Usage | None = None

    class VideoResponse(BaseModel):
        id: str
        object: str = "video"

    def create_app(server_args: Any, *, worker_pids: tuple[int, ...] = ()) -> FastAPI:
        return FastAPI()

    modules: dict[str, ModuleType] = {}
    runtime = "sglang.multimodal_gen.runtime"
    _module(modules, f"{runtime}.platforms.plugins", HookRegistry=HookRegistry, HookType=HookType)
    _module(
        modules,
        f"{runtime}.pipelines.diffusers_pipeline",
        DiffusersPipeline=DiffusersPipeline,
        DiffusersExecutionStage=DiffusersExecutionStage,
    )
    _module(
        modules,
        f"{runtime}.entrypoints.openai.utils",
        build_sampling_params=build_sampling_params,
        add_common_data_to_response=add_common_data_to_response,
    )
    _module(modules, f"{runtime}.entrypoints.openai.protocol", ImageResponse=ImageResponse, VideoResponse=VideoResponse)
    _module(modules, f"{runtime}.entrypoints.http_server", create_app=create_app)
    return modules


# -- vLLM-Omni ------------------------------------------------------------------------------------------------------


@dataclass
class DiffusionCacheConfig:
    rel_l1_thresh: float | None = None
    _extra_params: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DiffusionCacheConfig:
        known = {f.name for f in fields(cls)}
        return cls(
            **{name: value for name, value in data.items() if name in known},
            _extra_params={name: value for name, value in data.items() if name not in known},
        )


@dataclass
class OmniConfig:
    """What an adapter reads of ``OmniDiffusionConfig``; ``model`` makes the pipeline."""

    model: Callable[[], Any]
    cache_backend: str | None = "none"
    cache_config: Any = field(default_factory=dict)
    custom_pipeline_args: dict[str, Any] | None = None
    diffusers_call_kwargs: dict[str, Any] = field(default_factory=dict)
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.cache_config, dict):
            self.cache_config = DiffusionCacheConfig.from_dict(self.cache_config)


@dataclass
class Sampling:
    call: dict[str, Any]
    extra_args: dict[str, Any] = field(default_factory=dict)
    num_inference_steps: int | None = None


@dataclass
class Batch:
    sampling_params: Sampling
    request_id: str = "r"


@dataclass
class DiffusionOutput:
    output: Any = None


def vllm_omni() -> dict[str, ModuleType]:
    class CacheBackend:
        def __init__(self, config: Any) -> None:
            self.config = config
            self.enabled = False

        def is_enabled(self) -> bool:
            return self.enabled

    class TeaCacheBackend(CacheBackend):
        pass

    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend is None or cache_backend == "none":
            return None
        if cache_backend == "tea_cache":
            return TeaCacheBackend(cache_config)
        raise ValueError(f"Unsupported cache backend: {cache_backend}.")

    class DiffusersAdapterPipeline(torch.nn.Module):
        def __init__(self, *, od_config: OmniConfig, device: Any = None) -> None:
            super().__init__()
            self.od_config, self.device = od_config, device
            self._raise_unsupported_features()

        def load_weights(self) -> None:
            self._pipeline = self.od_config.model()

        def forward(self, req: Batch) -> DiffusionOutput:
            with torch.inference_mode():
                sampling = req.sampling_params
                steps = {"num_inference_steps": sampling.num_inference_steps}
                if sampling.num_inference_steps is None:
                    steps = self.od_config.diffusers_call_kwargs
                return DiffusionOutput(self._pipeline(**{**sampling.call, **steps}).images)

        def _raise_unsupported_features(self) -> None:
            if self.od_config.cache_backend not in ("none", None):
                raise NotImplementedError(f"Cache backend '{self.od_config.cache_backend}' is not supported")
            if self.od_config.enforce_eager:
                raise NotImplementedError("Eager execution is not supported with the diffusers backend.")

    modules: dict[str, ModuleType] = {}
    diffusion = "vllm_omni.diffusion"
    _module(modules, f"{diffusion}.cache.base", CacheBackend=CacheBackend)
    _module(modules, f"{diffusion}.cache.selector", get_cache_backend=get_cache_backend)
    _module(
        modules,
        f"{diffusion}.models.diffusers_adapter.pipeline_diffusers_adapter",
        DiffusersAdapterPipeline=DiffusersAdapterPipeline,
    )
    _module(modules, f"{diffusion}.distributed.utils", get_local_device=lambda: torch.device("cpu"))
    # imports the selector's function by name
    _module(modules, f"{diffusion}.worker.diffusion_model_runner", get_cache_backend=get_cache_backend)
    return modules
