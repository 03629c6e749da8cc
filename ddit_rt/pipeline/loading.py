"""Pipelines by name: a shipped model, a local folder, or a hub id; with call defaults and checks for each."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError

from ..errors import ConfigError
from ..families import family_of
from ..settings import is_whole, shown
from .quantization import check_scheme, quantize

DEMO, DEMO_256, DEMO_VIDEO = "demo", "demo-256", "demo-video"
_FOLDER = Path(__file__).parents[1] / "demo"
SHIPPED: Mapping[str, Path] = MappingProxyType(
    {DEMO: _FOLDER / "model", DEMO_256: _FOLDER / "model_256", DEMO_VIDEO: _FOLDER / "video_model"}
)
"""Name of a model inside the package -> its folder in diffusers format, whose demo.json says how to call it."""

_OURS = ("generator", "output_type", "return_dict")
"""Arguments of a call that whoever makes it sets, or reads the answer by."""
_COUNTS = (
    *("height", "width", "num_frames", "num_inference_steps"),
    *("num_images_per_prompt", "num_videos_per_prompt", "max_sequence_length"),
)
_SETTINGS = "demo.json"
_FRAME_RATE = 16  # of Wan's videos

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_any(model: str, dtype: str | None = None, device: str | None = None, scheme: str | None = None) -> Any:
    """Loads a pipeline for the command line, or for a server.

    Args:
        model: A name of :data:`SHIPPED`, a folder in diffusers format, or a hub id.
        dtype: "float32", "bfloat16" or "float16"; None takes bfloat16 on CUDA and float32 elsewhere.
        device: Of torch; None takes CUDA where there is one.
        scheme: Of :func:`~ddit_rt.pipeline.quantize`, for a transformer in few bits: it goes to the device layer by
            layer, which need not hold it before. None leaves it as it is.

    Raises:
        ConfigError: an unknown dtype, device or scheme, one that cannot be had, or no pipeline of this name.
        UnsupportedPipelineError: the pipeline is none that ddit_rt can accelerate.
    """
    device = device or default_device()
    _check_device(device)
    name = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r}: use one of {', '.join(DTYPES)}.")
    if scheme is not None:
        check_scheme(scheme)
    source = source_of(model)
    with naming(model):
        pipe = DiffusionPipeline.from_pretrained(source, dtype=DTYPES[name], local_files_only=model in SHIPPED)
    family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    if scheme is not None:
        quantize(pipe, scheme, device)
    return pipe.to(device)


def source_of(model: str) -> str:
    """What diffusers loads ``model`` from: a folder or a hub id.

    Raises:
        ConfigError: a path that holds no pipeline, or a shipped model that this installation lacks.
    """
    if model in SHIPPED:
        return str(_shipped_folder(model))
    folder = Path(model)
    is_path = folder.is_absolute() or folder.is_dir() or model.startswith(".")
    if is_path and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{model!r} holds no pipeline: a folder in diffusers format has a model_index.json.")
    return model


def _shipped_folder(model: str) -> Path:
    folder = SHIPPED[model]
    if not (folder / "model_index.json").is_file():
        present = [repr(name) for name, place in SHIPPED.items() if (place / "model_index.json").is_file()]
        raise ConfigError(
            f"{model!r} is not in this installation: {folder} holds no pipeline. Give "
            f"{' or '.join([*present, 'the folder of a trained one'])}."
        )
    return folder


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Turns the errors of an unknown, unreachable or incomplete pipeline into one that names the model.

    Raises:
        ConfigError: the pipeline's files cannot be found or read.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(
            f"{model!r} cannot be loaded: {reason}. Give {' or '.join(map(repr, SHIPPED))}, a folder in diffusers "
            "format, or the id of a hub repository that this machine can reach or has in its cache."
        ) from error


def call_defaults(model: str) -> dict[str, Any]:
    """Arguments that a call of ``model`` needs beyond diffusers' defaults: those in its demo.json, if it has one."""
    return _own_settings(model)["call"]


def example_prompts(model: str) -> dict[str, str]:
    """Prompts that a model was made for, by name, from the plainest to the most detailed: those in its demo.json."""
    return _own_settings(model)["prompts"]


def frame_rate(model: str) -> int:
    """Frames per second that a model's videos are shown at: ``fps`` in its demo.json, else 16, as Wan's."""
    return int(_own_settings(model).get("fps", _FRAME_RATE))


def is_own(model: str) -> bool:
    """Whether a model is one of this project's: it comes with a demo.json, and nothing is published for it."""
    return bool(_own_settings(model)["prompts"])


def makes_videos(pipe: Any) -> bool:
    """Whether a pipeline's calls give frames."""
    return not {"num_frames", "video"}.isdisjoint(inspect.signature(type(pipe).__call__).parameters)


def _own_settings(model: str) -> dict[str, Any]:
    """What the demo.json of a shipped model, or of one in a folder, says.

    Raises:
        ConfigError: a shipped model that this installation lacks.
    """
    path = (_shipped_folder(model) if model in SHIPPED else Path(model)) / _SETTINGS
    if not path.is_file():
        return {"call": {}, "prompts": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def call_arguments(
    model: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    further: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Arguments of a call of ``model``: its :func:`call_defaults`, and over them whatever is given and not None.

    Args:
        model: As for :func:`load_any`.
        height, width: Pixels.
        frames: Of a video.
        steps: Denoising steps.
        further: Arguments by the pipeline's own names.

    Raises:
        ConfigError: a size or number of steps below 1, or in ``further``, too.
    """
    for name, value in {"height": height, "width": width, "frames": frames, "steps": steps}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: at least 1.")
    sizes = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
    for name, value in sizes.items():
        if value is not None and name in further:
            raise ConfigError(f"{name}={shown(further[name])}: an option of its own says {value}; leave it out here.")
    given = {name: value for name, value in {**sizes, **further}.items() if value is not None}
    return {**call_defaults(model), **given}


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuses arguments that the pipeline does not know or are set here, values that are not the numbers that it
    takes, and sizes that it would silently change.

    Args:
        pipe: A supported pipeline.
        call: Arguments by the pipeline's own names; height and width in pixels.

    Raises:
        ConfigError: names the argument, and the nearest sizes that work.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in call if name not in parameters]
    if "num_frames" in unknown:
        raise ConfigError(f"frames={call['num_frames']}: {type(pipe).__name__} makes pictures; leave it out.")
    if unknown:
        raise ConfigError(f"{type(pipe).__name__} takes no argument {' or '.join(map(repr, unknown))}.")
    for name, value in call.items():
        _check_argument(name, value, parameters[name])
    geometry = family_of(pipe).geometry(pipe, 1024, 1024)
    side = 1024 // (geometry.height // geometry.patch)
    for name in ("height", "width"):
        value = call.get(name)
        if value is not None and (value < side or value % side):
            below = max(side, value // side * side)
            raise ConfigError(
                f"{name}={value}: this model takes multiples of {side} pixels, as in {below} or {below + side}."
            )
    frames, span = call.get("num_frames"), getattr(pipe, "vae_scale_factor_temporal", 1)
    if frames is not None and (frames - 1) % span:
        below = (frames - 1) // span * span + 1
        raise ConfigError(
            f"frames={frames}: this model takes 1 more than a multiple of {span}, as in {below} or {below + span}."
        )


def _check_argument(name: str, value: Any, parameter: inspect.Parameter) -> None:
    if name in _OURS:
        raise ConfigError(f"{name}={shown(value)}: it is set for every call; leave it out.")
    kind = parameter.annotation
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and (parameter.default is None or NoneType in kinds):
        return
    if name in _COUNTS and not (is_whole(value) and value >= 1):
        raise ConfigError(f"{name}={shown(value)}: a whole number from 1 on.")
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not is_finite and all(kind in (int, float, NoneType) for kind in kinds):
        raise ConfigError(f"{name}={shown(value)}: a finite number.")


def _check_device(device: str) -> None:
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r}: torch knows no such device; use cpu, cuda or cuda:1.") from None
    if parsed.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: this machine has no usable CUDA device; use --device cpu.")
    if (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices.")
