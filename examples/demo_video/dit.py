"""The transformer: a small diffusers `WanTransformer3DModel` and its rectified-flow training."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from examples.demo_model.maps import MapReader
from examples.training import denoiser
from examples.training.loop import Budget, RunLog, step_generator

from .clips import ClipStore
from .sizes import Sizes
from .text import build_tokenizer, embed, load_encoder, tokenize

FLOW_SHIFT = 3.0


def build_transformer(sizes: Sizes) -> WanTransformer3DModel:
    """An untrained transformer whose blocks start as the identity and whose output starts at zero."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        text_dim=sizes.text_width,
        freq_dim=128,
        ffn_dim=sizes.feed_forward,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        rope_max_seq_len=256,
    )
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out") or ".to_out.0." in name or ".ffn.net.2." in name:
            nn.init.zeros_(parameter)
    return model


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1), float32 (count,)."""
    return denoiser.levels(count, generator, mean=0.4, shift=FLOW_SHIFT, normals=0.5)


def _untrained(sizes: Sizes) -> denoiser.Trained:
    transformer = build_transformer(sizes)
    middle = transformer.blocks[sizes.layers // 2 - 1]
    return denoiser.Trained(transformer, middle, MapReader(sizes.heads * sizes.head_dim), lambda output: output)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2


def _read(trained: denoiser.Trained, maps: Tensor) -> Tensor:
    """Loss of the maps int8 (B, 3, f, h, w), a picture per latent frame."""
    tokens = trained.middle.unflatten(1, (maps.shape[2], -1)).flatten(0, 1)
    loss: Tensor = trained.reader.loss(tokens, maps.transpose(1, 2).flatten(0, 1))
    return loss


def train_dit(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool,
    stop_after: int | None = None,
) -> None:  # fmt: skip
    """Train at all sizes and lengths; the run's `dit.pt` holds weights, their average, optimizers and progress."""
    torch.manual_seed(seed)
    store = ClipStore.load(run, sizes)
    encoder = load_encoder(run, sizes).to(device)
    empty = tokenize(build_tokenizer(sizes), [""], sizes)
    trained = _untrained(sizes).to(device)
    denoiser.begin(trained, run)

    def loss(step: int, progress: float) -> Tensor:
        generator = step_generator(seed, step)
        bucket = sizes.buckets[denoiser.turn_of(sizes.phases, progress, seed, step)]
        clean, ids, maps = store.batch(bucket, generator)
        ids = denoiser.without_some(ids, empty, generator).to(device)
        batch = denoiser.Noised.of(clean, sample_sigmas, generator)
        with torch.no_grad():
            words = embed(encoder, ids)
        with denoiser.autocast(device):
            velocity = trained.transformer(
                hidden_states=batch.noisy.to(device),
                timestep=(1000 * batch.sigma).to(device),
                encoder_hidden_states=words,
                return_dict=False,
            )[0]
            read = _read(trained, maps.to(device))
        return denoiser.loss_of(velocity, batch.velocity.to(device), read, progress)

    denoiser.train(trained, loss, _is_matrix, run, budget, log, resume, stop_after)


def load_transformer(run: Path, sizes: Sizes) -> nn.Module:
    """The averaged weights of a run's last checkpoint, in evaluation mode."""
    return denoiser.averaged(_untrained(sizes), run)
