"""Exports a run as a diffusers `FluxPipeline`, begins a run from one, and checks it: 10 against 50 steps, a grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

from ddit_rt.demo import CALL_DEFAULTS, DEMO_PROMPTS, load_pipeline
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


def check(model: Path, picture: Path, log: RunLog, prompts: list[str], seeds: int, steps: tuple[int, int]) -> float:
    """Mean PSNR in dB between `steps[0]` and `steps[1]` steps from the same noise; writes a grid of the latter.

    One row a prompt, one column a seed. Every value goes into the log.
    """
    pipe = load_pipeline(path=model)
    pipe.set_progress_bar_config(disable=True)
    rows, values = [], []
    for prompt in prompts:
        row = {}
        for count in steps:
            arguments = {**CALL_DEFAULTS, "num_inference_steps": count}
            generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
            images = pipe(prompt, num_images_per_prompt=seeds, generator=generators, **arguments).images
            row[count] = [np.asarray(image) for image in images]
        decibels = [psnr(few, many) for few, many in zip(row[steps[0]], row[steps[1]], strict=True)]
        log.write("check", prompt=prompt, steps=steps, psnr_db=[round(value, 2) for value in decibels])
        values += decibels
        rows.append(np.concatenate(row[steps[1]], axis=1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(picture)
    mean = float(np.mean(values))
    log.write("check", steps=steps, mean_psnr_db=mean)
    return mean
