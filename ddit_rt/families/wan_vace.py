"""Wan VACE: Wan with control channels, which blocks of their own turn into hints for some of the main blocks.

The control latents (source video, what is to be kept and to be made, mask, reference pictures as frames before the
first) lie on the video's grid and are pooled with it; the hints then come out of the same coarse tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import WanVACEPipeline, WanVACETransformer3DModel
from torch import nn

from ..granularity import Geometry, Scalar, bands
from ..multiples import SUPPORTED_MULTIPLES
from .base import Family, ModelInputs, NotCoarseError
from .wan import Wan


class WanVACE(Wan):
    name = "wan-vace"
    transformer_class = WanVACETransformer3DModel
    pipelines = (WanVACEPipeline,)
    multiples = SUPPORTED_MULTIPLES  # hints are frames that are given
    shared_arguments = frozenset({"control_hidden_states_scale"})
    layer_groups: ClassVar[dict[str, str]] = {group: rf"(vace_)?{paths}" for group, paths in Wan.layer_groups.items()}
    # nothing is published for it, and hints come from outside the blocks that TeaCache skips
    trunk = Family.trunk

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        call = super().parse(module, arguments)
        # the pipeline keeps the size of a source video smaller than the one asked for
        size, control = call.latent.shape[-2:], arguments["control_hidden_states"].shape[-2:]
        if control != size:
            raise NotCoarseError(f"control latents of {tuple(control)} for a latent of {tuple(size)}")
        return call

    def coarse_arguments(self, call: ModelInputs, sigma: Scalar, multiple: int) -> dict[str, Any]:
        control = call.arguments["control_hidden_states"]
        return {
            **super().coarse_arguments(call, sigma, multiple),
            "control_hidden_states": bands.means(control, call.geometry, multiple),
        }

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config: Any = module.config
        width = config.num_attention_heads * config.attention_head_dim
        video, hints = geometry.tokens(multiple), len(config.vace_layers)
        # every hint has a projection, the first of these blocks one at its entry
        ends = video * ((hints + 1) * width + geometry.patch**2 * config.vace_in_channels) * width
        own = hints * self.block_flops(config, video, text_tokens) + 2.0 * ends
        return super().flops(module, geometry, multiple, text_tokens) + own
