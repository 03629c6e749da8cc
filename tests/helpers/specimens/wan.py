from __future__ import annotations

from typing import Any

from tiny import wan, wan_inputs

from ddit_rt.families.testing import Specimen


def call(*, images: int = 1, guided: bool = False, **options: Any) -> dict[str, Any]:
    return wan_inputs(num_videos_per_prompt=images, guidance_scale=3.0 if guided else 1.0, **options)


SPECIMENS = [Specimen("wan", wan, call, (128, 192), (80, 48), latents=lambda noise: noise)]
