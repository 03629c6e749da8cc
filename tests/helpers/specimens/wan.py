from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tiny import WAN, picture, wan, wan_inputs, wan_vae
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from ddit_rt.families.testing import Specimen, randomise


def call(*, images: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    return wan_inputs(num_videos_per_prompt=images, guidance_scale=3.0 if guided else 1.0, **options)


def variant(cls: type, transformer: torch.nn.Module, channels: int = 4, **more: Any) -> Any:
    """A pipeline with a VAE of ``channels``; ``more`` holds further components and settings."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(channels), "scheduler": scheduler, **more}
    pipe = cls(**parts, transformer=randomise(transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def long_prompt(given: dict[str, Any]) -> dict[str, Any]:
    """Wan 2.1 finds the image tokens by counting back 512 text tokens."""
    embeds = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(7))
    return given | {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}


def seeing() -> dict[str, Any]:
    """What turns a picture into five tokens."""
    encoder = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4
    )
    size = {"height": 8, "width": 8}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    return {"image_encoder": randomise(CLIPVisionModel(encoder)), "image_processor": processor}


def text_to_video() -> Any:
    pipe = wan()
    pipe.register_modules(vae=wan_vae())
    return pipe


# -- image-to-video ---------------------------------------------------------------------------------------------------


def image_to_video(pictures: int = 1) -> Any:
    """Wan 2.1: the pictures as tokens too; a first and a last one have positions among them."""
    seen = {"image_dim": 8, "added_kv_proj_dim": 24, "pos_embed_seq_len": 2 * 5 if pictures == 2 else None}
    return variant(WanImageToVideoPipeline, WanTransformer3DModel(**WAN | {"in_channels": 12}, **seen), **seeing())


def photo(height: int, width: int, seed: int = 3) -> Image.Image:
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
    return Image.fromarray(pixels.numpy())


def from_first(**options: Any) -> dict[str, Any]:
    given = long_prompt(call(**options))
    return given | {"image": photo(given["height"], given["width"])}


def from_both(**options: Any) -> dict[str, Any]:
    given = from_first(**options)
    return given | {"last_image": photo(given["height"], given["width"], seed=4)}


# -- TI2V-5B: a timestep per token ------------------------------------------------------------------------------------


def per_token(cls: type) -> Any:
    transformer = WanTransformer3DModel(**WAN | {"in_channels": 48, "out_channels": 48})
    return variant(cls, transformer, 48, expand_timesteps=True)


def from_picture(**options: Any) -> dict[str, Any]:
    given = call(**options)
    return given | {"image": picture(given["height"], given["width"])}


# -- video-to-video, VACE ---------------------------------------------------------------------------------------------


def video(height: int, width: int, frames: int = 5) -> list[Image.Image]:
    return [photo(height, width, seed) for seed in range(frames)]


def from_video(*, steps: int = 8, **options: Any) -> dict[str, Any]:
    """The last half of twice as many steps, so that as many run as are asked for."""
    given = call(steps=2 * steps, **options)
    del given["num_frames"]
    return given | {"video": video(given["height"], given["width"]), "strength": 0.5}


def vace() -> Any:
    # two latents, and of the mask the pixels that a latent pixel stands for
    return variant(WanVACEPipeline, WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=8 + 64))


def controlled(**options: Any) -> dict[str, Any]:
    given = call(**options)
    height, width = given["height"], given["width"]
    mask = [Image.new("L", (width, height), 255 * (frame % 2)) for frame in range(5)]
    return given | {"video": video(height, width), "mask": mask, "conditioning_scale": [1.0, 0.7]}


# -- Animate ----------------------------------------------------------------------------------------------------------


def animate() -> Any:
    transformer = WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 12, "latent_channels": 4},
        image_dim=8,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 4, "8": 4},
        motion_encoder_size=8,
        motion_style_dim=4,
        motion_dim=2,
        motion_encoder_dim=4,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    return variant(WanAnimatePipeline, transformer, **seeing())


def animated(**options: Any) -> dict[str, Any]:
    given = long_prompt(call(**options))
    del given["num_frames"]
    height, width = given["height"], given["width"]
    clips = {"pose_video": video(height, width), "face_video": video(8, 8)}
    return given | clips | {"image": photo(height, width), "segment_frame_length": 5}


SIZES: dict[str, Any] = {"size": (64, 128), "odd": (80, 48)}
UNPUBLISHED = {"TeaCache": "no coefficients are published for TI2V-5B"}
ENCODED: dict[str, Any] = {**SIZES, "self_similar": False}

SPECIMENS = [
    Specimen("wan", text_to_video, call, (128, 192), (80, 48), latents=lambda noise: noise),
    Specimen("wan-image", image_to_video, from_first, batches=False, **ENCODED),
    Specimen("wan-first-last", lambda: image_to_video(2), from_both, batches=False, **ENCODED),
    Specimen(
        "wan-ti2v",
        lambda: per_token(WanPipeline),
        call,
        latents=lambda noise: noise,
        limits=UNPUBLISHED,
        **SIZES,
    ),
    Specimen(
        "wan-ti2v-image",
        lambda: per_token(WanImageToVideoPipeline),
        from_picture,
        limits=UNPUBLISHED,
        **ENCODED,
    ),
    Specimen(
        "wan-video",
        lambda: variant(WanVideoToVideoPipeline, WanTransformer3DModel(**WAN)),
        from_video,
        **ENCODED,
    ),
    Specimen("wan-vace", vace, controlled, batches=False, **ENCODED),
    Specimen("wan-animate", animate, animated, batches=False, **ENCODED),
]
