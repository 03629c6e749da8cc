"""The demo's autoencoder: a diffusers `AutoencoderKL` with a factor of 4 and 4 latent channels, and its training."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL

from .common import Budget, Loop, RunLog, Sizes, load_state, save_atomic, step_generator
from .scenes import render_pyramid, sample_scene

_KL_WEIGHT = 2e-4
_EDGE_WEIGHT = 0.5


def build_vae(sizes: Sizes, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> AutoencoderKL:
    """An untrained autoencoder: (B, 3, H, W) in [-1, 1] <-> (B, 4, H/4, W/4)."""
    blocks = len(sizes.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sizes.resolutions[0],
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _loss(vae: AutoencoderKL, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    error = y - x
    # Pixel error alone leaves thin stripes and outlines soft; the error's own slope weighs them up.
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + _EDGE_WEIGHT * edges + _KL_WEIGHT * kl


def train_vae(run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool) -> None:
    """Train on whole pictures and crops of every resolution, measure the latents and write `vae_final.pt`."""
    torch.manual_seed(seed)
    large, small, smallest = sizes.resolutions[0], sizes.resolutions[1], sizes.resolutions[-1]
    rng = Random(f"{seed} vae")
    pictures = [render_pyramid(sample_scene(rng), (large, small, smallest)) for _ in range(sizes.vae_pictures)]
    pools = [np.stack([picture[i] for picture in pictures]) for i in range(3)]
    vae = build_vae(sizes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)

    def loss(step: int, _progress: float) -> torch.Tensor:
        generator = step_generator(seed, step)
        kind = torch.rand((), generator=generator).item()
        # Crops for the bulk, whole pictures because group norm sees the whole of them at generation time.
        pool, batch = (0, sizes.vae_batch // 4) if kind < 0.35 else (1, sizes.vae_batch)
        if kind > 0.92:
            pool, batch = 2, 2 * sizes.vae_batch
        elif kind > 0.65:
            pool, batch = 0, sizes.vae_batch
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        x = pools[pool][chosen.numpy()]
        if pool == 0 and kind > 0.65:
            top, left = torch.randint(large - small + 1, (2,), generator=generator).tolist()
            x = x[:, top : top + small, left : left + small]
        return _loss(vae, to_tensor(x).to(device), generator)

    Loop("vae", vae, [optimizer], budget, run / "vae.pt", log, decay_from=0.4).run(loss, resume)

    vae.eval()
    with torch.no_grad():
        x = to_tensor(np.stack([render_pyramid(sample_scene(rng), (large,))[0] for _ in range(64)])).to(device)
        z = vae.encode(x).latent_dist.mean
        error = (vae.decode(z).sample.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    psnr = (10 * torch.log10(4 / error)).mean().item()
    shift, scale = z.mean().item(), 1 / z.std().item()
    log.write("vae", psnr_db=psnr, scaling_factor=scale, shift_factor=shift, channel_std=str(z.std(dim=(0, 2, 3))))
    state = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}
    save_atomic(run / "vae_final.pt", {"module": state, "scaling_factor": scale, "shift_factor": shift})


def load_vae(run: Path, sizes: Sizes) -> AutoencoderKL:
    """The trained autoencoder of a run, in evaluation mode."""
    state = load_state(run / "vae_final.pt", "run --stage vae first")
    vae = build_vae(sizes, state["scaling_factor"], state["shift_factor"])
    vae.load_state_dict(state["module"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) to normalised latents, float32 (B, 4, H/4, W/4), about unit variance."""
    x = to_tensor(pictures).to(next(vae.parameters()).device)
    with torch.autocast(x.device.type, torch.bfloat16):
        mean = vae.encode(x).latent_dist.mean
    return (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor
