"""A model as its replica has it: loaded, accelerated, warm."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

import torch

from ..config import DDiTConfig
from ..pipeline import accelerate, check_call, load_any, warmup
from .engine import Engine
from .settings import ModelConfig, parse_size
from .variants import Variants
from .work import Work

logger = logging.getLogger(__name__)


def load(config: ModelConfig, waiting: int) -> Engine:
    """Loads a model and accelerates it.

    Args:
        config: Of the model.
        waiting: Works that may wait for it.

    Raises:
        ConfigError: there is no such model, or it does not take the sizes, the call or the settings; the device
            has no such quantisation.
        UnsupportedPipelineError: it is none that can be accelerated.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pipe = load_any(config.model, config.dtype, config.device, config.quantize)
    for size in config.sizes:
        width, height = parse_size(size)
        check_call(pipe, {**config.call, "width": width, "height": height})
    for name, source in config.loras.items():
        pipe.load_lora_weights(source, adapter_name=name)
    if config.loras:
        pipe.disable_lora()
    settings = DDiTConfig.make(config.settings, {})
    if config.speedup is not None and config.speedup > 1:
        settings = settings.replace(speedup=config.speedup)
    elif config.speedup == 1:
        settings = settings.replace(speedup=None, threshold=0.0)
    accelerate(pipe, config.adapter, settings)
    return Engine(Variants(pipe, config), waiting)


async def warm(engine: Engine) -> None:
    """Captures what can be captured at every size, and makes one thing whole: all later ones are as fast, and previews
    have something to learn from."""
    variants, facts = engine.variants, engine.variants.facts()
    if torch.device(variants.pipe._execution_device).type == "cuda":
        frames = facts.frames if facts.kind == "video" else None
        for size in facts.sizes:
            width, height = parse_size(size)
            await asyncio.to_thread(warmup, variants.pipe, height, width, frames, progress=False)
    width, height = parse_size(facts.sizes[0])
    work = Work(
        request_id="warm-up",
        kind="video" if facts.kind == "video" else "picture",
        prompt=facts.prompts[-1] if facts.prompts else "a street market with many people, seen from above",
        seed=0,
        width=width,
        height=height,
        frames=facts.frames,
        steps=facts.steps,
        deadline=time.time() + 3600,
    )
    if variants.needs_image:  # there is none to start from
        return
    began = time.perf_counter()
    async with aclosing(engine.run(work)) as events:
        async for _ in events:
            pass
    logger.info("%s is warm: the first %s took %.2f s", facts.name, facts.kind, time.perf_counter() - began)
