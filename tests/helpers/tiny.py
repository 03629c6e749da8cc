"""Pipelines of a few thousand random parameters: the real diffusers classes, no download, milliseconds per step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from ddit_rt.families.testing import randomise


def flux_transformer(guidance: bool = False, seed: int = 0, in_channels: int = 16) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return randomise(model, seed)


def autoencoder(channels: int = 4, halvings: int = 2, width: int = 8, groups: int = 4) -> AutoencoderKL:
    """A picture's autoencoder of ``channels`` latent channels that halves its sides ``halvings`` times."""
    model = AutoencoderKL(
        block_out_channels=(width,) * (halvings + 1),
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        latent_channels=channels,
        norm_num_groups=groups,
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return randomise(model)


def flux(kind: str = "text", dtype: torch.dtype = torch.float32, guidance: bool = False) -> Any:
    cls = {"text": FluxPipeline, "image": FluxImg2ImgPipeline, "inpaint": FluxInpaintPipeline}[kind]
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux_transformer(guidance),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def flux_inputs(batch: int = 1, height: int = 64, width: int = 64, steps: int = 8, **more: Any) -> dict[str, Any]:
    """Arguments of a FLUX call; 64 pixels are 16 x 16 latent pixels and 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(7)
    dtype = more.pop("dtype", torch.float32)
    return {
        "prompt_embeds": torch.randn(batch, 5, 24, generator=generator).to(dtype),
        "pooled_prompt_embeds": torch.randn(batch, 12, generator=generator).to(dtype),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **more,
    }


def negative(inputs: dict[str, Any], scale: float = 3.0) -> dict[str, Any]:
    """Adds true classifier-free guidance to FLUX inputs."""
    return {
        **inputs,
        "negative_prompt_embeds": -inputs["prompt_embeds"],
        "negative_pooled_prompt_embeds": -inputs["pooled_prompt_embeds"],
        "true_cfg_scale": scale,
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
"""Of a transformer."""


def wan_transformer(seed: int = 0, in_channels: int = 4, image_dim: int | None = None) -> WanTransformer3DModel:
    added = 24 if image_dim else None
    model = WanTransformer3DModel(**WAN | {"in_channels": in_channels}, image_dim=image_dim, added_kv_proj_dim=added)
    return randomise(model, seed)


def wan(dtype: torch.dtype = torch.float32, two: bool = False, euler: bool = False) -> WanPipeline:
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if euler
        else UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=wan_transformer().to(dtype),
        transformer_2=wan_transformer(seed=1).to(dtype) if two else None,
        boundary_ratio=0.6 if two else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_inputs(batch: int = 1, height: int = 64, width: int = 96, frames: int = 5, steps: int = 8, **more: Any) -> dict:
    """Arguments of a Wan call; 64 x 96 pixels are 8 x 12 latent pixels and 4 x 6 tokens per latent frame."""
    generator = torch.Generator().manual_seed(7)
    dtype = more.pop("dtype", torch.float32)
    embeds = torch.randn(batch, 6, 16, generator=generator).to(dtype)
    return {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": -embeds,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        "guidance_scale": 3.0,
        **more,
    }


def wan_vae(channels: int = 4) -> torch.nn.Module:
    zeros, ones = [0.0] * channels, [1.0] * channels
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=zeros, latents_std=ones
    )
    return randomise(vae)


def wan_image(image_dim: int | None = None) -> WanImageToVideoPipeline:
    """Image-to-video: 4 latent channels, 4 of the frame mask, 4 of the encoded image; ``image_dim`` as in Wan 2.1."""
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_transformer(in_channels=12, image_dim=image_dim),
    )
    if image_dim:  # in place of an image encoder
        embeds = torch.randn(1, 3, image_dim, generator=torch.Generator().manual_seed(3))
        pipe.encode_image = lambda image, device: embeds
    pipe.set_progress_bar_config(disable=True)
    return pipe


def smooth(pipe: Any) -> Any:
    """Calms a random transformer, so that its trajectory is as smooth as a trained model's."""
    transformer = pipe.transformer
    time = getattr(transformer, "time_text_embed", None) or transformer.condition_embedder
    embedder = getattr(time, "timestep_embedder", None) or time.time_embedder
    with torch.no_grad():
        embedder.linear_2.weight.mul_(0.02)
        transformer.proj_out.weight.mul_(0.1)
        transformer.proj_out.bias.mul_(0.1)
    return pipe


def picture(height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(5))


def latents_of(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Runs the pipeline with a fresh copy of the generator in ``inputs``."""
    generator = inputs.get("generator")
    if generator is not None:
        inputs = {**inputs, "generator": torch.Generator().manual_seed(generator.initial_seed())}
    output = pipe(**inputs)
    return output.frames if hasattr(output, "frames") else output.images


__all__ = [
    "WAN",
    "autoencoder",
    "flux",
    "flux_inputs",
    "flux_transformer",
    "latents_of",
    "negative",
    "picture",
    "randomise",
    "smooth",
    "wan",
    "wan_image",
    "wan_inputs",
    "wan_transformer",
    "wan_vae",
]
