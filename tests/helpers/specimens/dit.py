from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.dit import pipeline_dit

from ddit_rt.families.testing import Specimen, randomise


class SizedDiTPipeline(DiTPipeline):
    """The pipeline makes one size from noise of its own, and decodes it; this one takes both and gives latents."""

    def __call__(self, *, height: int, width: int, latents: Any = None, **arguments: Any) -> Any:
        assert height == width, "DiT's latents are square"
        self.transformer.register_to_config(sample_size=height // 8)
        noise = pipeline_dit.randn_tensor if latents is None else lambda **_: latents.to(self.transformer.dtype)
        seen: list[torch.Tensor] = []

        def decode(found: torch.Tensor) -> Any:
            seen.append(found)
            return SimpleNamespace(sample=found)

        with mock.patch.object(pipeline_dit, "randn_tensor", noise), mock.patch.object(self.vae, "decode", decode):
            super().__call__(**arguments, output_type="pt")
        return (seen[0],)


def make() -> Any:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
        scaling_factor=1.0,
    )
    pipe = SizedDiTPipeline(randomise(transformer), randomise(vae), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(*, batch: int = 1, guided: bool = False, images: int = 1, steps: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "class_labels": [1 + i for i in range(batch) for _ in range(images)],
        "num_inference_steps": steps,
        "guidance_scale": 4.0 if guided else 1.0,
        "generator": torch.Generator().manual_seed(1),
        **more,
    }


SPECIMENS = [
    Specimen("dit", make, call, (128, 128), (144, 144), latents=lambda noise: noise[:, :, 0]),
]
