from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from einops import rearrange
from PIL import Image

from ddit_rt.families.testing import Specimen, randomise


def _make(klein: bool) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": randomise(vae),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": randomise(transformer),
    }
    pipe = Flux2KleinPipeline(**parts) if klein else Flux2Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **size: int) -> dict[str, Any]:
    embeds = torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(7))
    return {
        "prompt_embeds": embeds,
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": 4.0 if guided else 1.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **({"negative_prompt_embeds": -embeds} if guided else {}),
        **size,
    }


def _reference(**options: Any) -> dict[str, Any]:
    pixels = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(3)).mul(255).byte()
    return {**_call(**options), "image": Image.fromarray(pixels.numpy())}


def _patched(noise: torch.Tensor) -> torch.Tensor:
    return rearrange(noise, "b c 1 (h p) (w q) -> b (c p q) h w", p=2, q=2)


SPECIMENS = [
    Specimen("flux2", lambda: _make(False), _call, latents=_patched, guided=False),
    Specimen("flux2-klein", lambda: _make(True), _call, latents=_patched),
    Specimen("flux2-klein-reference", lambda: _make(True), _reference, latents=_patched),
]
