from __future__ import annotations

from hashlib import sha256
from inspect import signature
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from einops import rearrange
from PIL import Image

from ddit_rt.families.testing import Specimen, randomise

# editing pipelines bring every reference to 1024 x 1024 pixels, which 64 to one are 8 x 8 tokens
EDIT_SIZES = ((1024, 1024), (1152, 640))
ENCODED: dict[Any, Any] = {}

MODEL: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
"""That a transformer and its ControlNet share."""


def qwen(
    cls: Any = QwenImagePipeline, *, levels: int | None = None, parts: dict[str, Any] | None = None, **config: Any
) -> Any:
    """A pipeline of Qwen-Image.

    Args:
        cls: Of it.
        levels: Of the autoencoder, each of half the side; as many as the specimens' sizes need unless given.
        parts: More of the pipeline's.
        **config: More of the transformer's configuration.
    """
    torch.manual_seed(0)
    references = "processor" in signature(cls.__init__).parameters
    levels = levels or (6 if references else 2)
    vae = AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * levels,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.0, 2.0, 1.5],
    )
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        **MODEL,
        **config,
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_remembering(randomise(vae)) if references else randomise(vae),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer),
        **({"processor": None} if references else {}),
        **(parts or {}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _remembering(vae: Any) -> Any:
    """Encodes a picture once for all pipelines made here: a large one takes a second, and the weights are the same."""
    own = vae.encode

    def encode(pixels: torch.Tensor, *args: Any) -> Any:
        digest = sha256(pixels.float().contiguous().numpy()).digest()
        key = (pixels.dtype, pixels.shape, vae.spatial_compression_ratio, digest)
        if key not in ENCODED:
            ENCODED[key] = own(pixels, *args)
        return ENCODED[key]

    vae.encode = encode
    return vae


def call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **size: int) -> dict[str, Any]:
    embeds = torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(7))
    # prompts of 5, 4, ... tokens; pipelines pass no mask where none is padded
    given = {"prompt_embeds": embeds, "prompt_embeds_mask": (torch.arange(5) < 5 - torch.arange(batch)[:, None]).long()}
    if guided:
        given["negative_prompt_embeds"] = -embeds[:, :3]
        given["negative_prompt_embeds_mask"] = torch.ones(batch, 3, dtype=torch.long)
    return {
        **given,
        "true_cfg_scale": 4.0 if guided else 1.0,
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **size,
    }


def picture(width: int, height: int) -> Image.Image:
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(3)).mul(255).byte()
    return Image.fromarray(pixels.numpy())


def _image(*, steps: int = 8, **options: Any) -> dict[str, Any]:
    return {**call(steps=2 * steps, **options), "image": picture(64, 64), "strength": 0.5}


def edit(**options: Any) -> dict[str, Any]:
    return {**call(**options), "image": picture(64, 64)}


def edit_two(**options: Any) -> dict[str, Any]:
    return {**call(**options), "image": [picture(64, 64), picture(64, 16)]}


def controlled(cls: Any, condition: int = 0) -> Any:
    """A pipeline with a ControlNet, whose picture has ``condition`` more channels than the latent."""
    net = QwenImageControlNetModel(
        num_layers=1,
        **MODEL,
        extra_condition_channels=4 * condition,
    )
    return qwen(cls, parts={"controlnet": randomise(net, seed=2)})


def control(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    return {**call(height=height, width=width, **options), "control_image": picture(width, height)}


def control_inpaint(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)  # the picture's latents are drawn without the call's generator
    given = control(height=height, width=width, **options)
    return {**given, "control_mask": picture(width, height).convert("L")}


def packed(noise: torch.Tensor) -> torch.Tensor:
    return rearrange(noise, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


SPECIMENS = [
    Specimen("qwen-image", qwen, call, latents=packed),
    Specimen("qwen-image-to-image", lambda: qwen(QwenImageImg2ImgPipeline), _image),
    Specimen("qwen-image-edit", lambda: qwen(QwenImageEditPipeline), edit, *EDIT_SIZES, latents=packed),
    Specimen(
        "qwen-image-edit-plus",
        lambda: qwen(QwenImageEditPlusPipeline, zero_cond_t=True),
        edit_two,
        *EDIT_SIZES,
        latents=packed,
        batches=False,
        limits={"graphs": "the transformer makes a tensor of Python numbers in every call (zero_cond_t)"},
    ),
    Specimen(
        "qwen-image-controlnet",
        lambda: controlled(QwenImageControlNetPipeline),
        control,
        latents=packed,
        self_similar=False,
    ),
    Specimen(
        "qwen-image-controlnet-inpaint",
        lambda: controlled(QwenImageControlNetInpaintPipeline, condition=1),
        control_inpaint,
        latents=packed,
        self_similar=False,
    ),
]
