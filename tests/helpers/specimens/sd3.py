from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from tiny import autoencoder

from ddit_rt.families.testing import Specimen, randomise

MODEL = {
    "sample_size": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 24,
}
"""That a transformer and its ControlNet share."""


def transformer(*, dual: bool = False, channels: int = 4, condition: int = 0) -> Any:
    """Three blocks; with ``dual`` as in SD3.5 medium, a second attention in some and normed queries and keys."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        in_channels=channels + condition,
        out_channels=channels,
        num_layers=3,
        **MODEL,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return randomise(model)


def make(
    cls: type = StableDiffusion3Pipeline, *, dual: bool = False, channels: int = 4, condition: int = 0, **parts: Any
) -> Any:
    """A pipeline of the class, with a VAE of 8 x 8 pixels per latent pixel."""
    torch.manual_seed(0)
    encoders = {f"{kind}{place}": None for kind in ("text_encoder", "tokenizer") for place in ("", "_2", "_3")}
    pipe = cls(
        transformer=transformer(dual=dual, channels=channels, condition=condition),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(channels, halvings=3, width=4, groups=1),
        **encoders,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **more: Any) -> dict[str, Any]:
    """Arguments of a call; 128 pixels are 16 x 16 latent pixels and 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(7)
    embeds, pooled = (torch.randn(batch, *shape, generator=generator) for shape in ((5, 12), (10,)))
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": -embeds,
        "negative_pooled_prompt_embeds": -pooled,
        "guidance_scale": 4.0 if guided else 1.0,
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **more,
    }


def from_picture(*, batch: int = 1, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Arguments of a call that begins at a picture."""
    picture = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))
    return {**call(batch=batch, **options), "height": height, "width": width, "image": picture, "strength": 0.9}


def masked(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Arguments of a call that repaints the right half of a picture."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., width // 2 :] = 1
    return {**from_picture(height=height, width=width, **options), "mask_image": mask}


def controlled(cls: type, *, channels: int = 4, condition: int = 0) -> Any:
    """A pipeline with a ControlNet, whose picture has ``condition`` more channels than the latent."""
    torch.manual_seed(0)
    net = SD3ControlNetModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        **MODEL,
        extra_conditioning_channels=condition,
    )
    return make(cls, channels=channels, controlnet=randomise(net, seed=2))


def control(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Arguments of a call with a picture for the ControlNet."""
    torch.manual_seed(0)  # the picture's latents are drawn without the call's generator
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    return {**call(**options), "height": height, "width": width, "control_image": picture}


def control_masked(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Arguments of a call that repaints the right half of a picture by a ControlNet."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., width // 2 :] = 1
    return {**control(height=height, width=width, **options), "control_mask": mask}


def inpaint(condition: int) -> Any:
    return make(StableDiffusion3InpaintPipeline, channels=16, condition=condition)


SIZES = ((128, 128), (144, 80))

SPECIMENS = [
    Specimen("sd3", make, call, *SIZES, latents=lambda noise: noise[:, :, 0]),
    Specimen("sd35-medium", lambda: make(dual=True), call, *SIZES, latents=lambda noise: noise[:, :, 0]),
    Specimen(
        "sd3-image",
        lambda: make(StableDiffusion3Img2ImgPipeline),
        from_picture,
        *SIZES,
        batches=False,
        self_similar=False,
    ),
    # the pipeline wants 16 channels, or 33 where mask and masked picture are given to the transformer
    Specimen("sd3-inpaint", lambda: inpaint(0), masked, *SIZES, batches=False, self_similar=False),
    Specimen("sd3-inpaint-condition", lambda: inpaint(17), masked, *SIZES, batches=False, self_similar=False),
    Specimen(
        "sd3-controlnet",
        lambda: controlled(StableDiffusion3ControlNetPipeline),
        control,
        *SIZES,
        latents=lambda noise: noise[:, :, 0],
        self_similar=False,
    ),
    Specimen(
        "sd3-controlnet-inpaint",
        lambda: controlled(StableDiffusion3ControlNetInpaintingPipeline, channels=16, condition=1),
        control_masked,
        *SIZES,
        latents=lambda noise: noise[:, :, 0],
        self_similar=False,
    ),
]
