"""The demo's autoencoder: a diffusers `AutoencoderKL` with a factor of 4 and 4 latent channels, and its training."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL

from examples.training.loop import Budget, Loop, RunLog, load_state, save_atomic, step_generator

from .scenes import render_pyramid, sample_scene
from .sizes import Sizes

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


def _reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    error = y.float() - x
    # Pixel error alone leaves thin stripes and outlines soft; the error's own slope weighs them up.
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + _EDGE_WEIGHT * edges


def _loss(vae: AutoencoderKL, x: torch.Tensor, generator: torch.Generator, decoder_only: bool) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        # The decoder alone learns on latents a little off, as the transformer's are.
        spread = posterior.mean.std() * 0.03 if decoder_only else posterior.std
        y = vae.decode(posterior.mean + spread * noise).sample
    loss = _reconstruction_loss(y, x)
    if decoder_only:
        return loss
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return loss + _KL_WEIGHT * kl


class _Pictures:
    """Scenes painted once at three sizes, and batches of them: whole pictures and crops."""

    def __init__(self, sizes: Sizes, rng: Random) -> None:
        self.sizes = sizes
        self.large, self.small = sizes.resolutions[0], sizes.resolutions[1]
        painted = [
            render_pyramid(sample_scene(rng), (self.large, self.small, sizes.resolutions[-1]))
            for _ in range(sizes.vae_pictures)
        ]
        self.pools = [np.stack([pictures[i] for pictures in painted]) for i in range(3)]

    def batch(self, generator: torch.Generator) -> torch.Tensor:
        """float32 (B, 3, side, side) in [-1, 1]; the side varies from call to call."""
        kind = torch.rand((), generator=generator).item()
        # Crops for the bulk, whole pictures because group norm sees the whole of them at generation time.
        pool, batch = (0, self.sizes.vae_batch // 4) if kind < 0.35 else (1, self.sizes.vae_batch)
        if kind > 0.92:
            pool, batch = 2, 2 * self.sizes.vae_batch
        elif kind > 0.65:
            pool, batch = 0, self.sizes.vae_batch
        chosen = torch.randint(len(self.pools[0]), (batch,), generator=generator)
        x = self.pools[pool][chosen.numpy()]
        if pool == 0 and kind > 0.65:
            top, left = torch.randint(self.large - self.small + 1, (2,), generator=generator).tolist()
            x = x[:, top : top + self.small, left : left + self.small]
        return to_tensor(x)


def train_vae(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool,
    decoder_only: bool = False,
) -> None:  # fmt: skip
    """Train the autoencoder and write `vae_final.pt` with the scale of its latents.

    With `decoder_only` the decoder of `vae_final.pt` is trained on, against the same latents: pictures get crisper and
    nothing that was trained on the latents goes stale.
    """
    torch.manual_seed(seed)
    stage, rate = ("decoder", 1e-3) if decoder_only else ("vae", 2e-3)
    rng = Random(f"{seed} {stage}")
    pictures = _Pictures(sizes, rng)
    vae = load_vae(run, sizes) if decoder_only else build_vae(sizes)
    vae = vae.to(device, memory_format=torch.channels_last).train()
    trained = (vae.decoder if decoder_only else vae).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)

    def loss(step: int, _progress: float) -> torch.Tensor:
        generator = step_generator(seed, step)
        return _loss(vae, pictures.batch(generator).to(device), generator, decoder_only)

    Loop(stage, trained, [optimizer], budget, run / f"{stage}.pt", log, decay_from=0.4).run(loss, resume)

    vae.eval()
    with torch.no_grad():
        x = np.stack([render_pyramid(sample_scene(rng), (pictures.large,))[0] for _ in range(64)])
        z = vae.encode(to_tensor(x).to(device)).latent_dist.mean
        error = (vae.decode(z).sample.clamp(-1, 1).cpu() - to_tensor(x)).square().mean(dim=(1, 2, 3))
    psnr = (10 * torch.log10(4 / error)).mean().item()
    shift, scale = z.mean().item(), 1 / z.std().item()
    if decoder_only:
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    log.write(stage, psnr_db=psnr, scaling_factor=scale, shift_factor=shift)
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
