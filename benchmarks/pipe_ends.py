"""What stands before and behind the denoising loop: text encoders and decoder of FLUX.1-dev and Wan 2.1.

The published configurations with random weights, in the precision that their pipelines are usually loaded in:
bfloat16, Wan's decoder float32. A request with guidance encodes its negative prompt too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from pipe_models import made
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

ENDS = ("text encoders", "decoder")
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_T5_TINY = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def make(model: str, end: str, device: torch.device, tiny: bool) -> Callable[[], Any]:
    """What a request does at one end, to be called any number of times.

    Args:
        model: Key of :data:`pipe_models.MODELS`.
        end: One of :data:`ENDS`.
        device: Where weights are made.
        tiny: Small enough for a CPU, in float32.
    """
    make_end = {"flux": (_flux_text, _flux_decoder), "wan": (_wan_text, _wan_decoder)}[model][ENDS.index(end)]
    return torch.no_grad()(make_end(device, tiny))


def _tokens(device: torch.device, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), device=device)


def _flux_text(device: torch.device, tiny: bool) -> Callable[[], Any]:
    clip_small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip_large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with made(device, torch.float32 if tiny else torch.bfloat16):
        clip = CLIPTextModel(CLIPTextConfig(**(clip_small if tiny else clip_large))).eval()
        t5 = T5EncoderModel(T5Config(vocab_size=32128, **(_T5_TINY if tiny else _T5_XXL))).eval()
    short, long = _tokens(device, 1, 77, 49408), _tokens(device, 1, 8 if tiny else 512, 32128)
    return lambda: (clip(short).pooler_output, t5(long).last_hidden_state)


def _wan_text(device: torch.device, tiny: bool) -> Callable[[], Any]:
    with made(device, torch.float32 if tiny else torch.bfloat16):
        config = UMT5Config(vocab_size=512 if tiny else 256384, **(_T5_TINY if tiny else _T5_XXL))
        encoder = UMT5EncoderModel(config).eval()
    tokens = _tokens(device, 1, 8 if tiny else 512, config.vocab_size)
    # prompt and negative prompt, one after the other, as the pipeline does
    return lambda: [encoder(tokens).last_hidden_state for _ in range(2)]


def _flux_decoder(device: torch.device, tiny: bool) -> Callable[[], Any]:
    widths = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    dtype = torch.float32 if tiny else torch.bfloat16
    with made(device, dtype):
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if tiny else 2,
            latent_channels=16,
            norm_num_groups=4 if tiny else 32,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()
    side = 4 if tiny else 128
    latent = torch.randn(1, 16, side, side, device=device, dtype=dtype)
    return lambda: vae.decode(latent, return_dict=False)[0]


def _wan_decoder(device: torch.device, tiny: bool) -> Callable[[], Any]:
    small = {"base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    with made(device, torch.float32):
        vae = AutoencoderKLWan(**(small if tiny else {})).eval()
    shape = (1, 16, 2, 4, 6) if tiny else (1, 16, 21, 60, 104)
    latent = torch.randn(shape, device=device)
    return lambda: vae.decode(latent, return_dict=False)[0]
