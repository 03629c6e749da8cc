"""Everything that happens once, before the first request: compiling, tuning, capturing."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..config import DDiTConfig
from ..errors import ConfigError, DDiTError
from ..schedule import Report
from .caller import is_modular
from .lifecycle import find_accelerated
from .watching import watched

if TYPE_CHECKING:
    from collections.abc import Iterator


def warmup(
    pipe: Any, height: int, width: int, num_frames: int | None = None, *, progress: bool = True, **call: Any
) -> Report:
    """Runs every patch size once, so that no request pays for compiling kernels or capturing graphs.

    It makes one short call of the accelerated pipeline, without decoding, on inputs that hold nothing; what is captured
    serves every later call with inputs of the same shapes. Call it once per resolution that will be asked for.

    Args:
        pipe: An accelerated pipeline, on its device.
        height, width: In pixels.
        num_frames: Of a video; None is the pipeline's default.
        progress: Show a progress bar.
        **call: More arguments of the pipeline's call, as the requests will have them: ``guidance_scale``,
            ``num_images_per_prompt``, ``prompt_embeds`` (needed if the text encoders are not loaded), ...

    Returns:
        The report of the warm-up call; ``executed`` tells how each size will run. :func:`ddit_rt.report` is unchanged.

    Raises:
        DDiTError: the pipeline is not accelerated.
        ConfigError: there is no prompt to run with, or frames for a pipeline that makes pictures.
    """
    found = find_accelerated(pipe)
    if found is None:
        raise DDiTError(f"this {type(pipe).__name__} is not accelerated: call ddit_rt.accelerate(pipe) first.")
    cycle = _cycle(found.config, len(found.transformers))
    # a pipeline that changes its transformer in mid-run needs a whole cycle on either side, wherever the change falls
    steps = len(cycle) * (1 if len(found.transformers) == 1 else 4)
    arguments = _arguments(pipe, height, width, num_frames, steps, call)
    with (
        tqdm(total=steps, desc=f"warm-up {width}x{height}", disable=not progress) as bar,
        own_bar_off(pipe),
        found.following(lambda index, patch_std: cycle[index % len(cycle)]) as reports,
        watched(pipe, lambda step: bar.update()),
    ):
        pipe(**arguments)
    return reports[0]


def _cycle(config: DDiTConfig, transformers: int) -> tuple[int, ...]:
    """Multiples whose run takes every way that a run with ``config`` can take through the model."""
    coarse = tuple(k for k in config.multiples if k > 1) if config.may_be_coarse else ()
    if config.schedule is None and config.order > 1 and transformers == 1:
        return (1, 1, *coarse)
    # the first coarse step may come when there is but one full step to lean on
    return (1, *coarse, 1, *coarse)


def _arguments(
    pipe: Any, height: int, width: int, num_frames: int | None, steps: int, call: dict[str, Any]
) -> dict[str, Any]:
    known = _names_of_call(pipe)
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),  # the global generators are not ours to advance
    }
    if "height" in known:  # DiT's makes one size
        arguments |= {"height": height, "width": width}
    if num_frames is not None:
        if "num_frames" not in known:
            raise ConfigError(f"num_frames={num_frames}: {type(pipe).__name__} makes pictures; leave it out.")
        arguments["num_frames"] = num_frames
    if "prompt" in known and call.get("prompt") is None and call.get("prompt_embeds") is None:
        if getattr(pipe, "text_encoder", None) is None:
            raise ConfigError("the text encoder is not loaded: pass prompt_embeds=... as the requests will have them.")
        arguments["prompt"] = ""
    for name in known & {"image", "control_image"}:
        arguments[name] = Image.new("RGB", (width, height))
    if "mask_image" in known:
        arguments["mask_image"] = Image.new("L", (width, height), 255)
    if "strength" in known:
        arguments["strength"] = 1.0  # less would run fewer steps
    if "max_area" in known:
        arguments["max_area"] = height * width  # Kontext scales other sizes to it
    return {**arguments, **call}


def _names_of_call(pipe: Any) -> set[str]:
    """What a call can be given; of a modular pipeline, what is the same whatever its blocks make of it: a picture that
    is there chooses another workflow."""
    if is_modular(pipe):
        return {entry.name for entry in pipe.blocks.inputs} & {"prompt", "height", "width", "num_frames"}
    return set(inspect.signature(type(pipe).__call__).parameters)


@contextmanager
def own_bar_off(pipe: Any) -> Iterator[None]:
    """Within the context calls of the pipeline show no progress bar."""
    shown = list(_blocks_with_bars(pipe._blocks)) if is_modular(pipe) else [pipe]
    kept = [getattr(one, "_progress_bar_config", None) for one in shown]
    for one, config in zip(shown, kept):
        one.set_progress_bar_config(**{**(config or {}), "disable": True})
    try:
        yield
    finally:
        for one, config in zip(shown, kept):
            if config is None:
                del one._progress_bar_config
            else:
                one._progress_bar_config = config


def _blocks_with_bars(block: Any) -> Iterator[Any]:
    """The blocks that loop, however deep; a modular pipeline's own setter reaches the outermost only."""
    if hasattr(block, "set_progress_bar_config"):
        yield block
    for inner in block.sub_blocks.values():
        yield from _blocks_with_bars(inner)
