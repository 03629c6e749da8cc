"""Every kind of pipeline call that an accelerated pipeline has to reproduce: name -> (pipeline, call arguments)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from tiny import flux, flux_inputs, negative, picture, wan, wan_image, wan_inputs

Case = tuple[Any, dict[str, Any]]


def _masked(height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def _with_scheduler(pipe: Any, scheduler: Any) -> Any:
    pipe.scheduler = scheduler
    return pipe


def _flow_dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


FLUX: dict[str, Callable[[], Case]] = {
    "flux": lambda: (flux(), flux_inputs()),
    "flux-guidance": lambda: (flux(guidance=True), flux_inputs(guidance_scale=4.0)),
    "flux-true-cfg": lambda: (flux(), negative(flux_inputs())),
    "flux-batch": lambda: (flux(), flux_inputs(batch=2)),
    "flux-two-images": lambda: (flux(), negative(flux_inputs(num_images_per_prompt=2))),
    "flux-odd": lambda: (flux(), negative(flux_inputs(height=72, width=40))),
    "flux-decoded": lambda: (flux(), flux_inputs(output_type="pt")),
    "flux-image": lambda: (flux("image"), flux_inputs(image=picture(), strength=0.75)),
    "flux-inpaint": lambda: (
        flux("inpaint"),
        negative(flux_inputs(height=72, width=40, image=picture(72, 40), mask_image=_masked(72, 40), strength=0.9)),
    ),
    "flux-unipc": lambda: (_with_scheduler(flux(), wan().scheduler), flux_inputs()),
}

WAN: dict[str, Callable[[], Case]] = {
    "wan": lambda: (wan(), wan_inputs()),
    "wan-no-cfg": lambda: (wan(), wan_inputs(guidance_scale=1.0)),
    "wan-euler": lambda: (wan(euler=True), wan_inputs()),
    "wan-dpm": lambda: (_with_scheduler(wan(), _flow_dpm()), wan_inputs()),
    "wan-heun": lambda: (_with_scheduler(wan(), FlowMatchHeunDiscreteScheduler(shift=3.0)), wan_inputs(steps=4)),
    "wan-batch": lambda: (wan(), wan_inputs(batch=2)),
    "wan-odd": lambda: (wan(), wan_inputs(height=48, width=80)),
    "wan-two": lambda: (wan(two=True), wan_inputs()),
    "wan-image": lambda: (wan_image(), wan_inputs(image=picture(64, 96))),
    "wan-image-embeds": lambda: (
        wan_image(image_dim=8),
        {**wan_inputs(image=picture(64, 96)), **_long_prompt()},
    ),
}

ALL = {**FLUX, **WAN}


def _long_prompt() -> dict[str, torch.Tensor]:
    """Wan 2.1 finds the image tokens by counting back 512 text tokens."""
    embeds = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(7))
    return {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
