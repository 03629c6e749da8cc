from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from tiny import flux, flux_inputs, negative

from ddit_rt.families.testing import Specimen


def call(*, images: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    inputs = flux_inputs(num_images_per_prompt=images, **options)
    return negative(inputs) if guided else inputs


def packed(noise: torch.Tensor) -> torch.Tensor:
    return rearrange(noise, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


SPECIMENS = [
    Specimen("flux", flux, call, latents=packed),
    Specimen("flux-dev", lambda: flux(guidance=True), lambda **o: call(**o) | {"guidance_scale": 4.0}, latents=packed),
]
