from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors

import ddit_rt.families.ltx2  # noqa: F401 (raises ImportError where diffusers is too old for the family)
from ddit_rt.families.testing import Specimen, randomise

FRAMES = 9  # two latent frames
SOUND = 5  # latents
OTHER_GUIDANCE_OFF = {"stg_scale": 0.0, "modality_scale": 1.0}


def transformer(*, newer: bool = False) -> Any:
    """Two blocks; with ``newer`` as in LTX-2.3: gates, modulated text, embeddings projected before."""
    model = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
        gated_attn=newer,
        cross_attn_mod=newer,
        audio_gated_attn=newer,
        audio_cross_attn_mod=newer,
        use_prompt_embeddings=not newer,
        perturbed_attn=newer,
        rope_type="split" if newer else "interleaved",
    )
    return randomise(model)


def make(cls: type = LTX2Pipeline, *, newer: bool = False) -> Any:
    """A pipeline of the class, with a VAE of 8 x 32 x 32 pixels per latent pixel."""
    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4,),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",) * 3,
        spatio_temporal_scaling=(True,) * 3,
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",) * 3,
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    connectors = LTX2TextConnectors(
        caption_channels=12,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16 if newer else 6,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8 if newer else 6,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        per_modality_projections=newer,
        video_hidden_dim=32,
        audio_hidden_dim=16,
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=randomise(vae),
        audio_vae=randomise(audio_vae),
        text_encoder=None,
        tokenizer=None,
        connectors=randomise(connectors),
        transformer=transformer(newer=newer),
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **more: Any) -> dict[str, Any]:
    """Arguments of a call; 256 pixels are 8 latent pixels and tokens."""
    generator = torch.Generator().manual_seed(7)
    embeds = torch.randn(batch, 6, 24, generator=generator)
    sound = torch.randn(1, 2, SOUND, 2, generator=generator).repeat(batch * images, 1, 1, 1)
    mask = torch.ones(batch, 6)
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": -embeds,
        "negative_prompt_attention_mask": mask,
        "audio_latents": sound,
        "num_frames": FRAMES,
        "num_videos_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guided else 1.0,
        "audio_guidance_scale": 5.0 if guided else 1.0,
        **{f"{stream}{name}": value for stream in ("", "audio_") for name, value in OTHER_GUIDANCE_OFF.items()},
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        **more,
    }


def all_guidance(*, guided: bool = False, **options: Any) -> dict[str, Any]:
    """Arguments of a call that runs the transformer three times a step, with everything that LTX-2.3 has."""
    scales = {f"{stream}{name}": 1.5 for stream in ("", "audio_") for name in OTHER_GUIDANCE_OFF}
    more = {**scales, "spatio_temporal_guidance_blocks": [1]}
    return {**call(guided=guided, **options), **more, "use_cross_timestep": True}


def from_picture(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Arguments of a call whose first frame is given."""
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    return {**call(**options), "height": height, "width": width, "image": picture, "image_crf": 0}


SIZES = ((256, 256), (288, 160))
LIMITS = {
    "band-limited run": "the sound keeps the noise levels of the full run, and the video sees it",
    "exact, images": "diffusers repeats no prompt_embeds for several videos",
}

SPECIMENS = [
    Specimen("ltx2", make, call, *SIZES, latents=lambda noise: noise, multiples=(2,), limits=LIMITS),
    Specimen(
        "ltx2-all-guidance",
        lambda: make(newer=True),
        all_guidance,
        *SIZES,
        latents=lambda noise: noise,
        multiples=(2,),
        limits={**LIMITS, "graphs": "a run with guidance across time reads a value on the host, and stays eager"},
    ),
    Specimen(
        "ltx2-image",
        lambda: make(LTX2ImageToVideoPipeline),
        from_picture,
        *SIZES,
        batches=False,
        multiples=(2,),
        self_similar=False,
        limits={"cost": "a timestep per token is embedded: a hundredth of the whole at the published size, not here"},
    ),
]
