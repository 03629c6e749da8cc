"""The demo's transformer: a small diffusers `FluxTransformer2DModel` and its rectified-flow training."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from examples.training import denoiser
from examples.training.loop import Budget, RunLog, step_generator

from .latents import LatentStore
from .maps import MapReader
from .sizes import Sizes
from .text import build_tokenizer, load_encoders, tokenize

LATENT_CHANNELS = 4


def build_transformer(sizes: Sizes) -> FluxTransformer2DModel:
    """An untrained transformer whose blocks start as the identity and whose output starts at zero."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=sizes.double_layers,
        num_single_layers=sizes.single_layers,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.width_heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=False,
        axes_dims_rope=sizes.rope,
    )
    for name, parameter in model.named_parameters():
        if (".norm" in f".{name}" and "linear" in name) or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return model


def pack(z: Tensor) -> Tensor:
    """Latents (B, 4, h, w) to FLUX's packed tokens (B, h/2 * w/2, 16)."""
    return FluxPipeline._pack_latents(z, z.shape[0], z.shape[1], z.shape[2], z.shape[3])


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Position ids, float32 (height * width, 3), of a grid of tokens, as `FluxPipeline` makes them."""
    return FluxPipeline._prepare_latent_image_ids(1, height, width, device, torch.float32)


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1), float32 (count,); the scheduler's shift at 256 tokens has mu = 0.5."""
    return denoiser.levels(count, generator, mean=0.2, shift=math.exp(0.5), normals=0.6)


def _untrained(sizes: Sizes) -> denoiser.Trained:
    transformer = build_transformer(sizes)
    blocks = transformer.single_transformer_blocks
    middle = blocks[max(0, len(blocks) // 3 - 1)]
    return denoiser.Trained(
        transformer, middle, MapReader(sizes.width_heads * sizes.head_dim), lambda output: output[1]
    )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name


def train_dit(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool,
    compile_model: bool = False, stop_after: int | None = None,
) -> None:  # fmt: skip
    """Train at all resolutions; the run's `dit.pt` holds weights, their average, optimizers and progress."""
    torch.manual_seed(seed)
    store = LatentStore.load(run, sizes)
    clip, t5 = (encoder.to(device) for encoder in load_encoders(run, sizes))
    empty = tokenize(build_tokenizer(sizes), [""], sizes)
    trained = _untrained(sizes).to(device)
    denoiser.begin(trained, run)
    model = trained.transformer
    # Autocast would carry the timestep in bfloat16 (3 digits of 1000 sigma) from the embedded tokens' dtype.
    model.x_embedder.register_forward_hook(lambda _module, _inputs, output: output.float())
    forward = torch.compile(model, dynamic=False) if compile_model else model
    text_ids = torch.zeros(sizes.text_tokens, 3, device=device)

    def loss(step: int, progress: float) -> Tensor:
        generator = step_generator(seed, step)
        resolution = denoiser.turn_of(sizes.phases, progress, seed, step)
        clean, ids, maps = store.batch(resolution, sizes.dit_batch[resolution], generator)
        ids = denoiser.without_some(ids, empty, generator).to(device)
        batch = denoiser.Noised.of(clean, sample_sigmas, generator)
        with torch.no_grad():
            pooled, words = clip(ids).pooler_output, t5(ids)[0]
        with denoiser.autocast(device):
            velocity = forward(
                hidden_states=pack(batch.noisy).to(device),
                timestep=batch.sigma.to(device),
                encoder_hidden_states=words,
                pooled_projections=pooled,
                txt_ids=text_ids,
                img_ids=image_ids(clean.shape[2] // 2, clean.shape[3] // 2, torch.device(device)),
                return_dict=False,
            )[0]
            read = trained.reader.loss(trained.middle, maps.to(device))
        return denoiser.loss_of(velocity, pack(batch.velocity).to(device), read, progress)

    denoiser.train(trained, loss, _is_matrix, run, budget, log, resume, stop_after)


def load_transformer(run: Path, sizes: Sizes) -> nn.Module:
    """The averaged weights of a run's last checkpoint, in evaluation mode."""
    return denoiser.averaged(_untrained(sizes), run)
