from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from PIL import Image

from ddit_rt.families.testing import Specimen, randomise

TOKENS = (31, 8, 23)  # of text, glyphs and a picture, in the real proportion


class TinyTextToVideo(HunyuanVideo15Pipeline):
    # the pipeline sets it to 729
    vision_num_semantic_tokens = property(lambda self: TOKENS[2], lambda self, tokens: None)


class TinyImageToVideo(HunyuanVideo15ImageToVideoPipeline):
    def encode_image(self, image: Any, batch_size: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
        embeds = torch.randn(1, TOKENS[2], 8, generator=torch.Generator().manual_seed(3))
        return embeds.repeat(batch_size, 1, 1).to(device, dtype)


def hunyuan_video(cls: Any = TinyTextToVideo, guidance: float = 1.0) -> Any:
    """16 x 16 pixels are a token, in one of 4 frames."""
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=128,
    )
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    image_parts = {"image_encoder": None, "feature_extractor": None} if cls is TinyImageToVideo else {}
    pipe = cls(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer),
        vae=randomise(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=guidance),
        **image_parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hunyuan_call(
    *, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **more: Any
) -> dict[str, Any]:
    """Masks differ between prompts, and between a prompt and its negative."""
    generator = torch.Generator().manual_seed(7)
    text, glyphs = (torch.randn(batch, n, d, generator=generator) for n, d in zip(TOKENS, (12, 10)))
    text_mask, glyph_mask = torch.ones(batch, TOKENS[0]), torch.ones(batch, TOKENS[1])
    text_mask[0, 20:] = 0
    glyph_mask[-1] = 0
    return {
        "prompt_embeds": text,
        "prompt_embeds_mask": text_mask,
        "prompt_embeds_2": glyphs,
        "prompt_embeds_mask_2": glyph_mask,
        "negative_prompt_embeds": -text,
        "negative_prompt_embeds_mask": text_mask.flip(1),
        "negative_prompt_embeds_2": -glyphs,
        "negative_prompt_embeds_mask_2": torch.zeros_like(glyph_mask),
        "num_videos_per_prompt": images,
        "num_frames": 5,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **more,
    }


def _image_call(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    # the size of the video is that of the picture, brought to an area of 128 x 128
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(5)).mul(255).byte()
    return {**hunyuan_call(**options), "image": Image.fromarray(pixels.numpy())}


FAILS = {"exact, images": "diffusers 0.42's HunyuanVideo15Pipeline fails for several videos per prompt"}
SPECIMENS = [
    Specimen(
        "hunyuan-video-1.5",
        hunyuan_video,
        hunyuan_call,
        (128, 192),
        (80, 112),
        latents=lambda noise: noise,
        guided=False,  # by its pipeline, not by the call
        limits=FAILS,
    ),
    Specimen(
        "hunyuan-video-1.5-guided",
        lambda: hunyuan_video(guidance=3.0),
        hunyuan_call,
        (128, 128),
        (80, 112),
        latents=lambda noise: noise,
        guided=False,
        limits=FAILS,
    ),
    Specimen(
        "hunyuan-video-1.5-image",
        lambda: hunyuan_video(TinyImageToVideo),
        _image_call,
        (128, 128),
        (112, 144),
        guided=False,
        self_similar=False,
    ),
]
