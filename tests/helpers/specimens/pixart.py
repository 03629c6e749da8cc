from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from ddit_rt.families.testing import Specimen, randomise


def make(cls: Any, scheduler: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=12,
        **config,
    )
    pipe = cls(tokenizer=None, text_encoder=None, vae=None, transformer=randomise(transformer), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def alpha() -> Any:
    """Told its size, with the variance beside the prediction, as PixArt-α at 1024 pixels."""
    return make(PixArtAlphaPipeline, DPMSolverMultistepScheduler(), sample_size=128, in_channels=4, out_channels=8)


def sigma() -> Any:
    return make(PixArtSigmaPipeline, DDIMScheduler(clip_sample=False), sample_size=16, in_channels=4, out_channels=8)


def velocity() -> Any:
    """Predicts v, and nothing else."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    return make(PixArtSigmaPipeline, scheduler, sample_size=16, in_channels=4, out_channels=4)


def call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **more: Any) -> dict[str, Any]:
    embeds = torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(7))
    mask = torch.ones(batch, 5)
    mask[:, 4] = 0
    return {
        "negative_prompt": None,
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": -embeds,
        "negative_prompt_attention_mask": mask,
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": 4.0 if guided else 1.0,
        "generator": torch.Generator().manual_seed(1),
        "use_resolution_binning": False,
        "output_type": "latent",
        **more,
    }


def flat(noise: torch.Tensor) -> torch.Tensor:
    return noise[:, :, 0]


IN_FLOAT32 = {"bfloat16": "DPM-Solver++ is stepped in float32, which rounds otherwise than its own bfloat16"}

SPECIMENS = [
    Specimen("pixart-alpha", alpha, call, (128, 128), (144, 80), latents=flat, limits=IN_FLOAT32),
    Specimen("pixart-sigma", sigma, call, (128, 128), (144, 80), latents=flat),
    Specimen("pixart-v", velocity, call, (128, 128), (144, 80), latents=flat),
]
