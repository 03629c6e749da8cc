"""A complete text-to-image pipeline of a few thousand random parameters, with text encoders; and a short training."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from tiny import randomise

from ddit_rt.distill import DistillConfig, Prompts, Trainer
from examples.demo_model.dit import build_transformer
from examples.demo_model.export import build_scheduler
from examples.demo_model.sizes import Sizes
from examples.demo_model.text import build_encoders, build_tokenizer
from examples.demo_model.vae import build_vae

PROMPTS = [f"{'a' if i % 2 else 'many'} {colour} {shape}" for i, (colour, shape) in enumerate(
    (colour, shape) for colour in ("red", "green", "blue", "white") for shape in ("ball", "star", "house")
)]  # fmt: skip
CALL = {"height": 32, "width": 32, "max_sequence_length": 24, "num_inference_steps": 8, "guidance_scale": 0.0}


def pipeline() -> Any:
    """A FluxPipeline for 32 x 32 pixels: 8 x 8 latent pixels, 4 x 4 tokens."""
    torch.manual_seed(0)
    sizes = Sizes.tiny()
    clip, t5 = build_encoders(sizes)
    pipe = FluxPipeline(
        scheduler=build_scheduler(),
        vae=build_vae(sizes).eval().requires_grad_(False),
        text_encoder=clip.eval().requires_grad_(False),
        tokenizer=build_tokenizer(sizes),
        text_encoder_2=t5.eval().requires_grad_(False),
        tokenizer_2=build_tokenizer(sizes),
        transformer=randomise(build_transformer(sizes)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = DistillConfig(
    steps=8,
    batch=2,
    accumulate=2,
    rank=4,
    optimizer="adamw",
    lr=3e-3,
    lr_warmup_steps=2,
    held_out=4,
    checkpoint_every=3,
    validate_every=1000,
    ema=0.9,
    fill=0.0,
)


def trainer(out, recordings, config=SMALL, pipe=None, **options):
    return Trainer(
        pipe or pipeline(), Prompts(PROMPTS), CALL, config, out, recordings=recordings, log=lambda _: None, **options
    )


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
