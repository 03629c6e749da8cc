"""Exports a run as a diffusers `FluxPipeline`, begins a run from one, and checks it at every size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

from ddit_rt.demo import CALL_DEFAULTS, DEMO_PROMPTS, load_pipeline
from ddit_rt.evaluate import coarse_news
from ddit_rt.evaluate.adherence import parse, read, to_pictures
from ddit_rt.pipeline import call_defaults
from examples.training import pipelines
from examples.training.loop import RunLog
from examples.training.pipelines import psnr

from .dit import load_transformer
from .sizes import Sizes
from .text import build_tokenizer, load_encoders
from .vae import load_vae


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler configuration."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def export(run: Path, sizes: Sizes, target: Path) -> None:
    """Write the run's averaged weights as a float16 pipeline to `target`, replacing what is there."""
    clip, t5 = load_encoders(run, sizes)
    pipe = FluxPipeline(
        scheduler=build_scheduler(),
        vae=load_vae(run, sizes),
        text_encoder=clip,
        tokenizer=build_tokenizer(sizes),
        text_encoder_2=t5,
        tokenizer_2=build_tokenizer(sizes),
        transformer=load_transformer(run, sizes),
    )
    call = {**CALL_DEFAULTS, "height": sizes.resolutions[0], "width": sizes.resolutions[0]}
    pipelines.write(pipe, {"call": call, "prompts": DEMO_PROMPTS}, target)


def adopt(model: Path, run: Path) -> None:
    """The inverse of `export`; see :func:`examples.training.pipelines.begin_from`."""
    pipe = load_pipeline(path=model)
    config = pipe.vae.config
    vae = {
        "module": pipe.vae.state_dict(), "scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor
    }  # fmt: skip
    text = {"clip": pipe.text_encoder.state_dict(), "t5": pipe.text_encoder_2.state_dict()}
    pipelines.begin_from(run, vae, text, pipe.transformer.state_dict())


def check(
    model: Path, sides: Sequence[int], folder: Path, log: RunLog, prompts: Sequence[str], seeds: int,
    steps: tuple[int, int]
) -> None:  # fmt: skip
    """How good a model is at each size, and what its coarse runs tell of its full ones; every value goes into the log.

    Args:
        model: Folder of an exported pipeline.
        sides: Of square pictures, in pixels, the largest first.
        folder: Gets a grid `check-SIDE.png` per size, at `steps[1]` steps: one row a prompt, one column a seed.
        log: Of the run. Per size the mean PSNR in dB between `steps[0]` and `steps[1]` steps from the same noise, and
            the share of the prompts' statements that the reader finds. Then, at the first size, what is missed of the
            low band of full predictions with coarse runs and without, see :func:`ddit_rt.evaluate.coarse_news`.
        prompts: In the grammar of the captions.
        seeds: Pictures per prompt.
        steps: A few, and many.
    """
    pipe = load_pipeline(path=model)
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    for side in sides:
        call = {**call_defaults(str(model)), "height": side, "width": side}
        rows, decibels, found = [], [], []
        for prompt in prompts:
            few, many = (_pictures(pipe, prompt, seeds, {**call, "num_inference_steps": count}) for count in steps)
            decibels += [psnr(one, other) for one, other in zip(few, many, strict=True)]
            statements = parse(prompt)
            assert statements is not None, prompt
            found += [reading.share(statements) for reading in read(to_pictures(many))]
            rows.append(np.concatenate(many, axis=1))
        Image.fromarray(np.concatenate(rows, axis=0)).save(folder / f"check-{side}.png")
        values = {"psnr_db": round(float(np.mean(decibels)), 2), "adherence": round(float(np.mean(found)), 3)}
        log.write("check", side=side, steps=steps, **values)
    call = {**call_defaults(str(model)), "num_inference_steps": steps[1]}
    for news in coarse_news(pipe, prompts, (2, 4), [max(1, (steps[1] - 1) // 16)], call):
        log.write("check", **asdict(news), news=round(news.news, 3))


def _pictures(pipe: FluxPipeline, prompt: str, seeds: int, call: Mapping[str, Any]) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    images = pipe(prompt, num_images_per_prompt=seeds, generator=generators, **call).images
    return [np.asarray(image) for image in images]
