from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from ddit_rt.families.testing import Specimen, randomise


def z_image(cls: Any = ZImagePipeline, **config: Any) -> Any:
    """16 x 16 pixels are a token."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
        **config,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=0.3,
        shift_factor=0.1,
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomise(vae),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image_call(
    *, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **more: Any
) -> dict[str, Any]:
    """The second prompt is longer than 32 tokens, so that the first is padded to it."""
    generator = torch.Generator().manual_seed(7)
    embeds = [torch.randn(length, 12, generator=generator) for length in (5, 40)[:batch]]
    return {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": [-one[:3] for one in embeds],
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guided else 0.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **more,
    }


def _image_call(*, height: int, width: int, steps: int = 8, **options: Any) -> dict[str, Any]:
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    # half of twice the steps
    given = {"image": pixels, "strength": 0.5, "height": height, "width": width}
    return {**z_image_call(steps=2 * steps, **options), **given}


SPECIMENS = [
    Specimen("z-image", z_image, z_image_call, (128, 128), (80, 48), latents=lambda noise: noise[:, :, 0]),
    Specimen("z-image-from-image", lambda: z_image(ZImageImg2ImgPipeline), _image_call, (128, 128), (80, 48)),
]
