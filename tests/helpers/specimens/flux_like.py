"""Chroma, LongCat-Image and Ovis-Image. The first two pipelines take no embeddings for several pictures of a
prompt, so these have text encoders, tiny ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from einops import rearrange
from PIL import Image
from tiny import autoencoder
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ddit_rt.families.testing import Specimen, randomise

TEXT = 12  # width of text embeddings
BLOCKS = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}
LETTERS = [chr(code) for code in range(33, 127)]
PROMPTS = ["a red fox", "two old grey barns by a lake"]


def vae(channels: int, halvings: int = 2) -> Any:
    return autoencoder(channels, halvings, width=4, groups=1)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def common(
    batch: int = 1, images: int = 1, steps: int = 8, height: int = 64, width: int = 64, **more: Any
) -> dict[str, Any]:
    return {
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **more,
    }


def packed(noise: torch.Tensor) -> torch.Tensor:
    return rearrange(noise, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def picture(height: int, width: int) -> Any:
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(3)).mul(255).byte()
    return Image.fromarray(pixels.numpy())


# -- Chroma ------------------------------------------------------------------------------------------------------------


def chroma(cls: type = ChromaPipeline) -> Any:
    torch.manual_seed(0)
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    config = T5Config(vocab_size=300, d_model=TEXT, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformer = ChromaTransformer2DModel(
        in_channels=16, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=1, **BLOCKS
    )
    if cls is ChromaInpaintPipeline:
        # diffusers 0.42's pipeline asks for it, and the model's configuration has none
        transformer.register_to_config(guidance_embeds=False)
    pipe = cls(
        scheduler=scheduler(),
        vae=vae(4),
        text_encoder=randomise(T5EncoderModel(config)),
        tokenizer=T5TokenizerFast(vocab=tokens),
        transformer=randomise(transformer),
    )
    return quiet(pipe)


def chroma_call(*, batch: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    # the first prompt leaves most of the text to padding
    return common(
        **options,
        prompt=PROMPTS[:batch],
        negative_prompt=["blur"] * batch,
        guidance_scale=4.0 if guided else 1.0,
        max_sequence_length=32,
    )


def chroma_image(**options: Any) -> dict[str, Any]:
    # eight of ten steps are run
    steps = options.pop("steps", 8) * 10 // 8
    given = chroma_call(**options, steps=steps)
    return {**given, "image": picture(given["height"], given["width"]), "strength": 0.8}


def chroma_inpaint(**options: Any) -> dict[str, Any]:
    given = chroma_image(**options)
    mask = torch.zeros(1, 1, given["height"], given["width"])
    mask[..., : given["width"] // 2] = 1
    return {**given, "mask_image": mask}


# -- LongCat-Image -----------------------------------------------------------------------------------------------------


@dataclass
class Processor:
    """In place of Qwen2VLProcessor, which needs torchvision; the pipeline takes nothing else of it."""

    image_processor: Any


def longcat_parts(channels: int) -> dict[str, Any]:
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate([*special, "Ġ", "Ċ", *LETTERS])}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = {token: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for token in ("vision_start", "vision_end")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    transformer = LongCatImageTransformer2DModel(in_channels=4 * channels, pooled_projection_dim=TEXT, **BLOCKS)
    return {
        "scheduler": scheduler(),
        "text_encoder": randomise(Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": tokenizer,
        "transformer": randomise(transformer),
    }


def longcat() -> Any:
    # the pipeline knows one number of latent channels
    return quiet(LongCatImagePipeline(vae=vae(16), text_processor=None, **longcat_parts(16)))


def longcat_edit() -> Any:
    # pictures of a million pixels: 64 of them to a side of a latent one leave 8 x 8 tokens
    processor = Processor(Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56))
    return quiet(LongCatImageEditPipeline(vae=vae(16, 6), text_processor=processor, **longcat_parts(16)))


def longcat_call(*, batch: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    return common(
        **options,
        prompt=PROMPTS[:batch],
        negative_prompt=["blur"] * batch,
        guidance_scale=4.0 if guided else 1.0,
        enable_prompt_rewrite=False,
    )


def longcat_edit_call(**options: Any) -> dict[str, Any]:
    given = longcat_call(**options)
    # the size follows from the picture's proportions
    height, width = given.pop("height"), given.pop("width")
    del given["enable_prompt_rewrite"]
    return {**given, "image": picture(height // 16, width // 16)}


# -- Ovis-Image --------------------------------------------------------------------------------------------------------


def ovis() -> Any:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(in_channels=16, out_channels=16, **BLOCKS)
    pipe = OvisImagePipeline(
        scheduler=scheduler(), vae=vae(4), text_encoder=None, tokenizer=None, transformer=randomise(transformer)
    )
    return quiet(pipe)


def ovis_call(*, batch: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    embeds = torch.randn(batch, 5, TEXT, generator=torch.Generator().manual_seed(7))
    negative = {"negative_prompt_embeds": -embeds} if guided else {}
    scale = 4.0 if guided else 1.0
    return common(**options, prompt_embeds=embeds, negative_prompt=None, guidance_scale=scale, **negative)


SPECIMENS = [
    Specimen("chroma", chroma, chroma_call, latents=packed),
    Specimen("chroma-image", lambda: chroma(ChromaImg2ImgPipeline), chroma_image, self_similar=False),
    Specimen("chroma-inpaint", lambda: chroma(ChromaInpaintPipeline), chroma_inpaint, self_similar=False),
    Specimen("longcat-image", longcat, longcat_call, latents=packed),
    Specimen(
        "longcat-image-edit",
        longcat_edit,
        longcat_edit_call,
        (1024, 1024),
        (896, 1152),
        latents=packed,
        batches=False,
        self_similar=False,
        limits={"save and load": "the specimen's processor of pictures is a stand-in"},
    ),
    Specimen("ovis-image", ovis, ovis_call, latents=packed),
]
