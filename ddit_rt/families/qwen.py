"""Qwen-Image, its editing and layered models: packed tokens, rotary positions made inside from sizes of pictures.

A call lists the sizes of all its pictures in tokens, the latent's first and those of references after it. Positions of
every picture are centred on it, and those of the text begin where the largest picture ends: a coarse step in native
positions names the smaller picture's size, and one on the full grid lets the model place text and references for the
full sizes and places the latent's coarse tokens itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from diffusers import (
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import nn

from ..granularity import Geometry, coarse_centres, swapped
from ..runtime import TeaCacheDefaults, Trunk, own_part
from .base import ModelInputs, NotCoarseError, present
from .control import check_residuals, coarse_residuals
from .packed import PackedFamily, is_truly_guided

Size = tuple[int, int, int]
"""Frames, rows and columns of a picture, in tokens."""

_RESIDUALS = "controlnet_block_samples"
"""What a ControlNet gives."""

TEACACHE = TeaCacheDefaults("qwen-image", 0.2, (-450.0, 280.0, -45.0, 3.2, -0.02))  # as vLLM-Omni publishes them


class QwenImage(PackedFamily):
    name = "qwen-image"
    transformer_class = QwenImageTransformer2DModel
    pipelines = (
        QwenImagePipeline,
        QwenImageImg2ImgPipeline,
        QwenImageInpaintPipeline,
        QwenImageEditPipeline,
        QwenImageEditInpaintPipeline,
        QwenImageEditPlusPipeline,
        QwenImageLayeredPipeline,
        *present("QwenImageControlNetPipeline", "QwenImageControlNetInpaintPipeline"),
    )
    projection_names = ("img_in", "proj_out")
    # the latter in older versions of diffusers
    listed_arguments = frozenset({"img_shapes", "txt_seq_lens"})
    time_scale = 1.0
    layer_groups: ClassVar[dict[str, str]] = {
        "feed-forward": r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
    }

    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        call = super().parse(module, arguments)
        check_residuals(arguments, call.geometry, _RESIDUALS)
        return call

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        sizes = _sizes(arguments)
        tokens, listed = arguments[self.latent_argument].shape[1], sum(map(prod, sizes))
        if tokens != listed:
            raise NotCoarseError(f"img_shapes lists {listed} tokens, there are {tokens}")
        frames, rows, columns = sizes[0]
        if frames != 1:
            raise NotCoarseError(f"a picture of {frames} frames")
        return rows, columns

    def frames(self, module: nn.Module, arguments: Mapping[str, Any]) -> int:
        # a layered picture: all of it, its layers, and the picture that it is taken from
        config: Any = module.config
        sizes = _sizes(arguments)
        count = len(sizes) - 1 if config.use_layer3d_rope else 1
        if sizes[:count] != sizes[:1] * count:
            raise NotCoarseError(f"layers of several sizes: {sizes}")
        return count

    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        """Of a layered picture, ``frames`` are the layers; the model makes the whole picture beside them."""
        geometry = super().geometry(pipe, height, width)
        return replace(geometry, frames=frames + 1) if isinstance(pipe, QwenImageLayeredPipeline) else geometry

    def placed_arguments(self, call: ModelInputs, multiple: int, native: bool) -> dict[str, Any]:
        frames, grid = call.geometry.frames, call.geometry.grid(multiple)
        sizes = [(1, *grid)] * frames + _sizes(call.arguments)[frames:]
        residuals = coarse_residuals(call, multiple, _RESIDUALS)
        return {"img_shapes": [sizes] * len(call.arguments["img_shapes"]), **residuals}

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        if native:
            return nullcontext()
        rope: Any = module.pos_embed
        coarse = _latent_rope(rope, call.geometry, multiple, call.latent.device)

        def place(_: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            # without a hook that splits what it gives
            pictures, text = type(rope).forward(rope, call.arguments["img_shapes"], *args, **kwargs)
            return own_part(rope, (torch.cat([coarse, pictures[call.geometry.tokens(1) :]]), text))

        return swapped(module, pos_embed=place)

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        return is_truly_guided(call)

    def trunk(self, module: nn.Module) -> Trunk:
        def signal(arguments: Mapping[str, Any], retention: bool) -> torch.Tensor:
            # the first block's input as its own modulation leaves it; references change little and would hide the rest
            tokens = self.frames(module, arguments) * prod(_sizes(arguments)[0])
            hidden = module.img_in(arguments["hidden_states"])[:, :tokens]
            time = arguments["timestep"].to(hidden.dtype)
            embedded = module.time_text_embed(time, hidden, arguments.get("additional_t_cond"))
            block = module.transformer_blocks[0]
            shift, scale, *_ = block.img_mod(embedded)[:, None].chunk(6, dim=-1)
            return block.img_norm1(hidden) * (1 + scale) + shift

        return Trunk(TEACACHE, module.img_in, ("transformer_blocks",), module.norm_out, lambda tokens: tokens, signal)

    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        config = module.config
        width = config.num_attention_heads * config.attention_head_dim
        image = geometry.tokens(multiple)
        total = image + text_tokens
        # per token and block, of text and pictures alike: attention 4 d², feed-forward 8 d²
        blocks = config.num_layers * 12 * width**2 * total
        attention = config.num_layers * 2 * total**2 * width
        # references that are modulated as clean have a second timestep
        times = 2 if config.zero_cond_t else 1
        modulation = (config.num_layers * 6 * (times + 1) + 2) * width**2 + times * (256 + width) * width
        ends = image * 2 * config.in_channels * width + text_tokens * config.joint_attention_dim * width
        return 2.0 * (blocks + attention + modulation + ends)

    def _channels(self, module: nn.Module) -> int:
        config: Any = module.config
        return int(config.out_channels)  # of pixels, where those of FLUX count a patch's


def _sizes(arguments: Mapping[str, Any]) -> list[Size]:
    """Sizes of a sample's pictures.

    Raises:
        NotCoarseError: samples differ in them.
    """
    samples = arguments["img_shapes"]
    if any(sample != samples[0] for sample in samples):
        raise NotCoarseError(f"samples of several sizes: {samples}")
    first = samples[0]
    return list(first) if isinstance(first, list) else [first]


def _latent_rope(rope: Any, geometry: Geometry, multiple: int, device: torch.device) -> torch.Tensor:
    """Rotations of the latent's coarse tokens, at the centres of the full patches that each covers.

    Args:
        rope: The transformer's own, for its axes.
        geometry: Of the latent.
        multiple: k.
        device: Where to make them.

    Returns:
        complex64 (N, head dim / 2), in the order frame, row, column.
    """
    rows, columns = geometry.grid(1)
    shape = (geometry.frames, *geometry.grid(multiple))
    # pictures count along the first axis, and the grid is centred
    centres = (
        torch.arange(geometry.frames, device=device, dtype=torch.float32),
        coarse_centres(shape[1], multiple, device) - (rows - rows // 2),
        coarse_centres(shape[2], multiple, device) - (columns - columns // 2),
    )
    angles = []
    for axis, (dim, positions) in enumerate(zip(rope.axes_dim, centres)):
        rates = rope.theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        view = [1, 1, 1, dim // 2]
        view[axis] = shape[axis]
        angles.append(torch.outer(positions, rates).view(view).expand(*shape, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angle), angle)
