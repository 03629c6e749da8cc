"""Exports a run as a diffusers `WanPipeline`, begins a run from one, and checks it: 10 against 50 steps, a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image

from examples.training import pipelines
from examples.training.loop import RunLog
from examples.training.pipelines import psnr

from .dit import FLOW_SHIFT, load_transformer
from .sizes import Sizes
from .text import build_tokenizer, load_encoder
from .vae import load_vae

PROMPTS = {
    "plain": "a red ball bounces",
    "detailed": "a yellow star moves right behind a blue square on a drifting striped background",
    "turning": "a striped green star turns on a white background",
    "fence": "a purple fish moves left behind a fence",
}
GUIDANCE = 2.0
FRAME_RATE = 8


def call_defaults(sizes: Sizes) -> dict[str, Any]:
    """Keyword arguments for calling the exported pipeline; sizes in pixels and frames."""
    return {
        "height": sizes.resolutions[0], "width": sizes.resolutions[0], "num_frames": sizes.frames,
        "num_inference_steps": 50, "guidance_scale": GUIDANCE, "max_sequence_length": sizes.text_tokens,
    }  # fmt: skip


def build_scheduler() -> UniPCMultistepScheduler:
    """Wan 2.1's scheduler configuration for small sizes."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


def export(run: Path, sizes: Sizes, target: Path) -> None:
    """Write the run's averaged weights as a float16 pipeline to `target`, replacing what is there."""
    pipe = WanPipeline(
        tokenizer=build_tokenizer(sizes),
        text_encoder=load_encoder(run, sizes),
        vae=load_vae(run, sizes),
        scheduler=build_scheduler(),
        transformer=load_transformer(run, sizes),
    )
    demo = {"call": call_defaults(sizes), "prompts": PROMPTS, "fps": FRAME_RATE}
    pipelines.write(pipe, demo, target)


def load_pipeline(path: Path) -> WanPipeline:
    """An exported pipeline in float32."""
    return WanPipeline.from_pretrained(str(path), dtype=torch.float32, local_files_only=True)


def adopt(model: Path, run: Path) -> None:
    """The inverse of `export`; see :func:`examples.training.pipelines.begin_from`."""
    pipe = load_pipeline(model)
    config = pipe.vae.config
    vae = {"module": pipe.vae.state_dict(), "mean": config.latents_mean, "std": config.latents_std}
    pipelines.begin_from(run, vae, pipe.text_encoder.state_dict(), pipe.transformer.state_dict())


def check(
    model: Path, sizes: Sizes, sheet: Path, log: RunLog, prompts: list[str], seeds: int, steps: tuple[int, int]
) -> float:
    """Mean PSNR in dB between `steps[0]` and `steps[1]` steps from the same noise; writes a sheet of the latter.

    One row a clip, every fourth frame of it. Every value goes into the log.
    """
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    rows, values = [], []
    for prompt in prompts:
        for seed in range(seeds):
            clips = []
            for count in steps:
                call = {**call_defaults(sizes), "num_inference_steps": count, "output_type": "np"}
                frames = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).frames[0]
                clips.append((255 * frames).round().astype(np.uint8))
            values.append(psnr(clips[0], clips[1]))
            rows.append(np.concatenate(list(clips[1][::4]), axis=1))
        log.write("check", prompt=prompt, steps=steps, psnr_db=[round(value, 2) for value in values[-seeds:]])
    sheet.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(sheet)
    mean = float(np.mean(values))
    log.write("check", steps=steps, mean_psnr_db=mean)
    return mean
