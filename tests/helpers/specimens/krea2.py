from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from einops import rearrange

from ddit_rt.families.testing import Specimen, randomise

TEXT = 12  # width of text embeddings


def krea2() -> Any:
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * 3,
        temperal_downsample=[False, True],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=randomise(autoencoder),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer),
        text_encoder_select_layers=(0, 1, 2),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def krea2_call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **size: int) -> dict[str, Any]:
    embeds = torch.randn(batch, 6, 3, TEXT, generator=torch.Generator().manual_seed(7))
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[:, 3:5] = False  # padding lies before the template's end
    negative = {"negative_prompt_embeds": -embeds, "negative_prompt_embeds_mask": mask.roll(1, 1)} if guided else {}
    return {
        "prompt_embeds": embeds,
        "prompt_embeds_mask": mask,
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guided else 0.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **negative,
        **size,
    }


def packed(noise: torch.Tensor) -> torch.Tensor:
    return rearrange(noise, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


SPECIMENS = [Specimen("krea2", krea2, krea2_call, latents=packed)]
