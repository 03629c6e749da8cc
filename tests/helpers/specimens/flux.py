from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from einops import rearrange
from tiny import flux, flux_inputs, flux_transformer, negative, picture

from ddit_rt.families.testing import Specimen, randomise
from ddit_rt.granularity import bands

CHANNELS = 4
COMPRESSION = 4
"""Of the tiny VAE, on a side."""


def call(*, images: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    inputs = flux_inputs(num_images_per_prompt=images, **options)
    return negative(inputs) if guided else inputs


def packed(noise: torch.Tensor) -> torch.Tensor:
    return rearrange(noise, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def variant(cls: type, in_channels: int = 16, **more: Any) -> Any:
    """A pipeline of FLUX's tiny parts, its transformer with as many input channels."""
    parts = flux().components | {"transformer": flux_transformer(True, in_channels=in_channels)} | more
    pipe = cls(**{name: parts[name] for name in inspect.signature(cls).parameters if name in parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def planes(channels: int, height: int, width: int) -> torch.Tensor:
    """Latents (1, C, 1, H, W) for a size in pixels; half the height and width gives the means of the whole."""
    full = torch.randn(1, channels, 1, 16, 16, generator=torch.Generator().manual_seed(11))
    height, width = height // COMPRESSION, width // COMPRESSION
    if 16 % height or height != width:
        return torch.randn(1, channels, 1, height, width, generator=torch.Generator().manual_seed(11))
    return bands.down(full, 16 // height)


def from_picture(*, height: int, width: int, steps: int = 8, **options: Any) -> dict[str, Any]:
    """The last half of twice as many steps, so that as many run as are asked for."""
    given = call(height=height, width=width, steps=2 * steps, **options)
    return given | {"image": picture(height, width), "strength": 0.5}


def masked(height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


# -- Kontext ----------------------------------------------------------------------------------------------------------


def kontext(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    reference = torch.randn(1, CHANNELS, 12, 20, generator=torch.Generator().manual_seed(3))
    return call(height=height, width=width, **options) | {"image": reference, "max_area": height * width}


def kontext_inpaint(**options: Any) -> dict[str, Any]:
    given = from_picture(**options)
    height, width = given["height"], given["width"]
    return given | {"mask_image": masked(height, width), "_auto_resize": False, "max_area": height * width}


# -- Fill -------------------------------------------------------------------------------------------------------------

FILL = (CHANNELS + CHANNELS + COMPRESSION**2) * 4
"""Input channels: the latent's, the masked picture's, and of the mask the pixels that a latent pixel stands for."""


def fill(**options: Any) -> dict[str, Any]:
    given = from_picture(**options)
    return given | {"mask_image": masked(given["height"], given["width"])}


# -- Control ----------------------------------------------------------------------------------------------------------


def control_latents(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    return call(height=height, width=width, **options) | {"control_image": packed(planes(CHANNELS, height, width))}


def control_image(**options: Any) -> dict[str, Any]:
    given = from_picture(**options)
    return given | {"control_image": picture(given["height"], given["width"]).flip(-1)}


def control_inpaint(**options: Any) -> dict[str, Any]:
    given = control_image(**options)
    return given | {"mask_image": masked(given["height"], given["width"])}


# -- ControlNet -------------------------------------------------------------------------------------------------------


def controlnet(cls: type, modes: int | None = None) -> Any:
    made = FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        num_mode=modes,
    )
    return variant(cls, controlnet=randomise(made, seed=2))


def controlnet_call(*, height: int, width: int, **options: Any) -> dict[str, Any]:
    return call(height=height, width=width, **options) | {"control_image": picture(height, width)}


# -- IP-Adapter -------------------------------------------------------------------------------------------------------


def with_adapter() -> Any:
    pipe = variant(FluxPipeline)
    transformer = pipe.transformer
    width = transformer.inner_dim
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, width, 3)])
    transformer.set_attn_processor(
        {
            name: FluxAttnProcessor() if name.startswith("single") else FluxIPAdapterAttnProcessor(width, width, (3,))
            for name in transformer.attn_processors
        }
    )
    randomise(transformer)
    return pipe


def adapted(*, batch: int = 1, images: int = 1, **options: Any) -> dict[str, Any]:
    embeds = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(4))
    given = call(batch=batch, images=images, **options)
    return given | {"ip_adapter_image_embeds": [embeds], "negative_ip_adapter_image_embeds": [-embeds]}


encoded = partial(Specimen, self_similar=False)

SPECIMENS = [
    Specimen("flux", flux, call, latents=packed),
    Specimen("flux-dev", lambda: flux(guidance=True), lambda **o: call(**o) | {"guidance_scale": 4.0}, latents=packed),
    Specimen("flux-kontext", lambda: variant(FluxKontextPipeline), kontext, latents=packed),
    encoded("flux-kontext-inpaint", lambda: variant(FluxKontextInpaintPipeline), kontext_inpaint),
    encoded("flux-fill", lambda: variant(FluxFillPipeline, FILL), fill, guided=False),
    Specimen("flux-control", lambda: variant(FluxControlPipeline, 32), control_latents, latents=packed, guided=False),
    encoded("flux-control-image", lambda: variant(FluxControlImg2ImgPipeline, 32), control_image, guided=False),
    encoded("flux-control-inpaint", lambda: variant(FluxControlInpaintPipeline, 32), control_inpaint, guided=False),
    encoded("flux-controlnet", lambda: controlnet(FluxControlNetPipeline), controlnet_call),
    encoded(
        "flux-controlnet-union",
        lambda: controlnet(FluxControlNetPipeline, modes=3),
        lambda **o: controlnet_call(**o) | {"control_mode": 1},
        limits={
            "exact, images": "diffusers 0.42 has one mode for two images of a prompt: without ddit_rt it fails too"
        },
    ),
    encoded("flux-controlnet-image", lambda: controlnet(FluxControlNetImg2ImgPipeline), control_image, guided=False),
    encoded(
        "flux-controlnet-inpaint", lambda: controlnet(FluxControlNetInpaintPipeline), control_inpaint, guided=False
    ),
    Specimen(
        "flux-ip-adapter",
        with_adapter,
        adapted,
        latents=packed,
        limits={
            "save and load": "diffusers 0.42 does not load the IP-Adapter that it saved with a transformer",
            "layerwise casting": "diffusers 0.42's ImageProjection computes in the 8 bits that its weight is stored in",
        },
    ),
]
