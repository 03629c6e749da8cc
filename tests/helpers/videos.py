"""A video model of random weights in a folder, with what makes it loadable by name: text encoder, VAE, demo.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from helpers import tiny
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from ddit_rt.demo import MODEL_DIR
from ddit_rt.families.testing import randomise

CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 10, "guidance_scale": 3.0}
PROMPTS = {"plain": "a red ball moves left", "detailed": "zebras behind a fence"}


def text_parts() -> dict[str, Any]:
    """A Wan pipeline's tokenizer and text encoder: the demo's words, random weights."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR / "tokenizer_2")
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": randomise(UMT5EncoderModel(config))}


def video_pipeline() -> Any:
    """A WanPipeline that takes texts; its VAE compresses space and time four times: 64 pixels are 8 x 8 tokens."""
    pipe = tiny.smooth(tiny.wan())
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 3, num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=4, scale_factor_temporal=4,
    )  # fmt: skip
    pipe = type(pipe)(**text_parts(), vae=randomise(vae), scheduler=pipe.scheduler, transformer=pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video_model(folder: Path, **settings: Any) -> Path:
    """Saves :func:`video_pipeline` and how it is called; ``settings`` go into its demo.json. Returns the folder."""
    video_pipeline().save_pretrained(folder)
    content = {"call": CALL, "prompts": PROMPTS, "fps": 8, **settings}
    (folder / "demo.json").write_text(json.dumps(content))
    return folder
