"""Settings of a server, in Python and as a YAML or JSON file."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainValidator

from ..config import DDiTConfig
from ..errors import ConfigError
from ..settings import JSON_ENDING, YAML_ENDINGS, Expected, Settings, read_json, read_yaml, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of ``"WxH"``.

    Raises:
        ValueError: it is written otherwise.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ConfigError(f"name={shown(name)}: letters, digits, '.', '_' and '-', at most 100, are taken.")
    return name


def _checked_sizes(sizes: Any) -> tuple[str, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise ConfigError(f"sizes={shown(sizes)}: a list such as ['1024x1024', '1360x768'].")
    for size in sizes:
        try:
            parse_size(size)
        except (ValueError, TypeError):
            raise ConfigError(f"sizes: {shown(size)} is no WIDTHxHEIGHT in pixels, as in '1024x768'.") from None
    return tuple(sizes)


def _checked_loras(loras: Any) -> dict[str, str]:
    if not isinstance(loras, Mapping) or not all(isinstance(v, str) for v in loras.values()):
        raise ConfigError(f"loras={shown(loras)}: a mapping of names to files or hub ids.")
    return {_checked_name(name): source for name, source in loras.items()}


def _checked_settings(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings={shown(settings)}: a mapping of DDiTConfig's fields.")
    if DDiTConfig.make(settings, {}).fit is not None:
        raise ConfigError("settings: fit='first-calls' would keep requests waiting; run `ddit-rt fit` before.")
    return dict(settings)


def _checked_scheme(scheme: Any) -> str | None:
    if scheme is not None:
        # asked when there is one to check: what knows the schemes loads torch
        importlib.import_module("ddit_rt.pipeline").check_scheme(scheme)
    return None if scheme is None else str(scheme)


def _checked_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ConfigError(f"call={shown(call)}: a mapping of arguments of the pipeline's call.")
    return dict(call)


class Limits(Settings):
    """What a request may ask for. Checked before any work.

    Raises:
        ConfigError: a value is out of range.
    """

    prefix: ClassVar[str] = "limits."

    prompt: Annotated[int, Field(ge=1), Expected("characters, a whole number >= 1.")] = 32_000
    """Characters of a prompt, and of a negative one."""
    pictures: Annotated[int, Field(ge=1, le=10), Expected("pictures, 1 to 10.")] = 10
    """``n`` of one request."""
    pixels: Annotated[int, Field(ge=64), Expected("pixels, a whole number.")] = 4 * 1024 * 1024
    """Width times height."""
    frames: Annotated[int, Field(ge=1), Expected("frames, a whole number >= 1.")] = 241
    """Of a video."""
    steps: Annotated[int, Field(ge=1), Expected("steps, a whole number >= 1.")] = 100
    upload_bytes: Annotated[int, Field(ge=1024), Expected("bytes, a whole number >= 1024.")] = 25 * 2**20
    """Of a request's body."""
    upload_pixels: Annotated[int, Field(ge=64), Expected("pixels, a whole number.")] = 32 * 2**20
    """Of an uploaded picture, read from its header before it is decoded."""
    waiting: Annotated[int, Field(ge=1), Expected("a whole number >= 1.")] = 64
    """Pictures that may wait for one replica; beyond that, requests are answered with 429."""
    videos: Annotated[int, Field(ge=1), Expected("a whole number >= 1.")] = 100
    """Video jobs that may wait in all, and a quarter of it per key."""
    seconds: Annotated[float, Field(gt=0), Expected("seconds, a number > 0.")] = 600.0
    """Longest time from the request to the picture."""
    requests_per_minute: Annotated[int, Field(ge=1), Expected("a whole number >= 1, or None.")] | None = None
    """Of one key, or of one address where there are no keys; None for no limit."""


class ModelConfig(Settings):
    """One model of a server.

    Raises:
        ConfigError: a value is out of range.
    """

    prefix: ClassVar[str] = "models."

    name: Annotated[str, PlainValidator(_checked_name)]
    """What requests call it."""
    model: Annotated[
        str,
        Field(min_length=1),
        Expected("'demo', 'demo-256', 'demo-video', a folder in diffusers format, or a hub id."),
    ]
    speedup: Annotated[float | None, Field(ge=1), Expected("a number >= 1 (1 is plain), or None.")] = None
    """Target of requests that name none; None is that of :func:`ddit_rt.accelerate`."""
    settings: Annotated[dict[str, Any], PlainValidator(_checked_settings)] = Field(default_factory=dict)
    """Fields of :class:`ddit_rt.DDiTConfig`, as a mapping."""
    adapter: Annotated[str | None, Expected("a file, a folder or a hub id, or None.")] = None
    """Trained adapter for coarse steps."""
    loras: Annotated[dict[str, str], PlainValidator(_checked_loras)] = Field(default_factory=dict)
    """Name that requests may use -> file or hub id, loaded at the start."""
    call: Annotated[dict[str, Any], PlainValidator(_checked_call)] = Field(default_factory=dict)
    """Arguments of the pipeline's call that differ from its defaults, as ``num_inference_steps`` or
    ``true_cfg_scale``."""
    sizes: Annotated[tuple[str, ...], PlainValidator(_checked_sizes)] = ()
    """"WIDTHxHEIGHT" to warm up; the first is that of requests that name none. Empty: the model's own."""
    quantize: Annotated[str | None, PlainValidator(_checked_scheme)] = None
    """Scheme of :func:`ddit_rt.quantize` for the transformer's blocks, ``"auto"`` for the one that suits the card; None
    leaves them as they are. LoRAs stay beside the quantised layers."""
    dtype: Annotated[str | None, Expected("'float32', 'bfloat16', 'float16', or None.")] = None
    device: Annotated[str | None, Expected("of torch, or None.")] = None
    replicas: Annotated[int, Field(ge=1), Expected("a whole number >= 1.")] = 1
    """At first, and at least."""
    max_replicas: Annotated[int | None, Field(ge=1), Expected("a whole number >= 1, or None.")] = None
    """More are started while pictures wait, up to here; None: as many as ``replicas``."""
    gpus: Annotated[float | None, Field(ge=0), Expected("a number >= 0, or None.")] = None
    """Of a replica; None: one where the machine has GPUs, else none."""
    cpus: Annotated[float, Field(ge=0), Expected("a number >= 0.")] = 1.0
    """Of a replica. It may be a fraction."""
    threads: Annotated[int | None, Field(ge=1), Expected("a whole number >= 1, or None.")] = None
    """CPU threads of a replica; None leaves that to torch."""
    max_batch: Annotated[int, Field(ge=1), Expected("pictures, a whole number >= 1.")] = 4
    """Pictures that run together."""
    max_batch_tokens: Annotated[int | None, Field(ge=1), Expected("tokens, a whole number >= 1, or None.")] = None
    """Tokens at p that run together; out of memory lowers it. None: ``max_batch`` pictures of any size."""
    batch_wait: Annotated[float, Field(ge=0, le=10), Expected("seconds, 0 to 10.")] = 0.01
    """How long a picture waits for others to run with while the device is idle."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for name in ("quality", "schedule"):
            value = self.settings.get(name)
            if self.speedup is not None and value is not None:
                raise ConfigError(
                    f"models: {self.name!r} has speedup={self.speedup:g} and {name}={shown(value)} in its settings: a "
                    "target or a schedule decides alone; leave out one of them."
                )


def _checked_models(models: Any) -> tuple[ModelConfig, ...]:
    if isinstance(models, str) or not isinstance(models, Sequence) or not models:
        raise ConfigError(f"models={shown(models)}: a list of models, at least one.")
    made = []
    for given in models:
        if isinstance(given, Mapping):
            ModelConfig.check_names(given)
            for name in ("name", "model"):
                if name not in given:
                    raise ConfigError(f"models: {shown(dict(given))} has no {name!r}.")
            given = ModelConfig(**given)
        if not isinstance(given, ModelConfig):
            raise ConfigError(f"models: {shown(given)} is no mapping of a model's settings.")
        made.append(given)
    names = [model.name for model in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"models: {name!r} is there twice; give each its own name.")
    return tuple(made)


def _checked_limits(limits: Any) -> Limits:
    if isinstance(limits, Mapping):
        Limits.check_names(limits)
        return Limits(**limits)
    if not isinstance(limits, Limits):
        raise ConfigError(f"limits={shown(limits)}: a mapping of limits.")
    return limits


class ServeConfig(Settings):
    """A server: its models, its address and what it allows.

    Raises:
        ConfigError: a value is out of range.
    """

    models: Annotated[tuple[ModelConfig, ...], PlainValidator(_checked_models)]
    """The first serves requests that name none."""
    host: Annotated[str, Field(min_length=1), Expected("an address to listen at.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535), Expected("1 to 65535.")] = 8000
    keys_file: Annotated[str | None, Expected("a file of keys, or None.")] = None
    """API keys, see :mod:`ddit_rt.serve.keys`; ``DDIT_RT_API_KEYS`` holds further ones. Without any, all may come."""
    folder: Annotated[
        str, Field(min_length=1), BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v), Expected("a folder.")
    ] = "ddit-serve"
    """For videos, and for pictures that are asked for by URL."""
    keep_hours: Annotated[float, Field(gt=0), Expected("hours, a number > 0.")] = 24.0
    """How long they are kept."""
    limits: Annotated[Limits, PlainValidator(_checked_limits)] = Limits()
    drain_seconds: Annotated[float, Field(ge=0), Expected("seconds, a number >= 0.")] = 120.0
    """How long a server that is told to stop goes on with what it has begun."""
    playground: Annotated[bool, Expected("use True or False.")] = True
    """Serve the page at ``/``."""

    @classmethod
    def load(cls, path: str | Path) -> ServeConfig:
        """Reads a ``.yaml``, ``.yml`` or ``.json`` file of the fields.

        Raises:
            ConfigError: no such file, another ending, or a value out of range.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (*YAML_ENDINGS, JSON_ENDING):
            raise ConfigError(f"config={str(path)!r}: name a .yaml, .yml or .json file.")
        values = read_json(path, "config") if suffix == JSON_ENDING else read_yaml(path, "config")
        if not isinstance(values, dict) or "models" not in values:
            raise ConfigError(f"config={str(path)!r} has no 'models': a mapping with a list of models is wanted.")
        cls.check_names(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data; ``ServeConfig(**config.to_dict())`` equals ``config``."""
        plain = {name: getattr(self, name) for name in type(self).model_fields}
        models = [{name: getattr(model, name) for name in ModelConfig.model_fields} for model in self.models]
        limits = {name: getattr(self.limits, name) for name in Limits.model_fields}
        return {**plain, "models": models, "limits": limits}
