"""The autoencoder: a small diffusers `AutoencoderKLWan`, 4 x smaller in space and in time, and its training."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from torch import Tensor, nn

from examples.training.loop import Budget, Loop, RunLog, load_state, save_atomic, step_generator

from .scenes import render, sample_clip
from .sizes import Sizes

_KL_WEIGHT = 1e-4
_EDGE_WEIGHT = 0.5


def build_vae(sizes: Sizes, mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """An untrained autoencoder: (B, 3, 1 + 4 (f - 1), H, W) in [-1, 1] <-> (B, channels, f, H/4, W/4)."""
    levels = len(sizes.vae_multipliers) - 1
    vae = AutoencoderKLWan(
        base_dim=sizes.vae_width,
        z_dim=sizes.latent_channels,
        dim_mult=list(sizes.vae_multipliers),
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True] * levels,
        latents_mean=mean or [0.0] * sizes.latent_channels,
        latents_std=std or [1.0] * sizes.latent_channels,
        scale_factor_temporal=2**levels,
        scale_factor_spatial=2**levels,
    )
    for attention in _attentions(vae):
        # Trained on crops, it would not carry over to whole frames: it adds nothing, and stays so.
        nn.init.zeros_(attention.proj.weight)
        nn.init.zeros_(attention.proj.bias)
    return vae


def _attentions(vae: AutoencoderKLWan) -> list[WanAttentionBlock]:
    return [module for module in vae.modules() if isinstance(module, WanAttentionBlock)]


def to_tensor(clips: np.ndarray) -> Tensor:
    """uint8 (B, frames, H, W, 3) to float32 (B, 3, frames, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1).contiguous()


def _loss(vae: AutoencoderKLWan, x: Tensor, generator: torch.Generator, decoder_only: bool) -> Tensor:
    with torch.set_grad_enabled(not decoder_only):
        posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    # The decoder alone learns on latents a little off, as the transformer's are.
    spread = posterior.mean.std() * 0.03 if decoder_only else posterior.std
    y = _decoded(vae, posterior.mean + spread * noise)
    error = y - x
    # Pixel error alone leaves stripes and outlines soft and motion jerky; the error's own slopes weigh them up.
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    if x.shape[2] > 1:
        edges = edges + 0.5 * error.diff(dim=2).abs().mean()
    loss = error.abs().mean() + error.square().mean() + _EDGE_WEIGHT * edges
    if decoder_only:
        return loss
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return loss + _KL_WEIGHT * kl


def _decoded(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """`AutoencoderKLWan.decode` without its clamp, which has no gradient where a value is far off."""
    vae.clear_cache()
    z = vae.post_quant_conv(z)
    frames = []
    for index in range(z.shape[2]):
        vae._conv_idx = [0]
        state = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        frames.append(vae.decoder(z[:, :, index : index + 1], **state, first_chunk=index == 0))
    vae.clear_cache()
    return torch.cat(frames, dim=2)


class _Clips:
    """Clips painted once at two sizes, and batches of crops of them, one frame or several."""

    def __init__(self, sizes: Sizes, rng: Random) -> None:
        self.sizes = sizes
        painted = [render(sample_clip(rng), sizes.resolutions[:2], sizes.frames) for _ in range(sizes.vae_clips)]
        self.pools = [np.stack([clip[i] for clip in painted]) for i in range(2)]

    def batch(self, generator: torch.Generator) -> Tensor:
        """float32 (B, 3, frames, crop, crop) in [-1, 1]; the length varies from call to call."""
        sizes = self.sizes
        kind, size, start = torch.rand(3, generator=generator).tolist()
        # whole clips too: what a causal convolution remembers has to hold to their end
        frames = sizes.vae_frames[int(kind * len(sizes.vae_frames))]
        batch = max(sizes.vae_batch // frames, 1)
        first = int(start * (sizes.frames - frames + 1))
        pool = self.pools[int(size < 0.3)]
        chosen = torch.randint(len(pool), (batch,), generator=generator).tolist()
        crop = sizes.vae_crop
        places = torch.randint(pool.shape[2] - crop + 1, (batch, 2), generator=generator).tolist()
        crops = [
            pool[clip, first : first + frames, top : top + crop, left : left + crop]
            for clip, (top, left) in zip(chosen, places, strict=True)
        ]
        return to_tensor(np.stack(crops))


def train_vae(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool,
    decoder_only: bool = False,
) -> None:  # fmt: skip
    """Train the autoencoder and write `vae_final.pt` with the mean and spread of its latents, per channel.

    With `decoder_only` the decoder of `vae_final.pt` is trained on, against the same latents: frames get crisper and
    nothing that was trained on the latents goes stale.
    """
    torch.manual_seed(seed)
    stage, rate = ("decoder", 6e-4) if decoder_only else ("vae", 1e-3)
    rng = Random(f"{seed} {stage}")
    clips = _Clips(sizes, rng)
    vae = (load_vae(run, sizes) if decoder_only else build_vae(sizes)).to(device).train()
    for part in (vae.decoder, vae.post_quant_conv) if decoder_only else (vae,):
        part.requires_grad_(True)
    for attention in _attentions(vae):
        attention.requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)

    def loss(step: int, _progress: float) -> Tensor:
        generator = step_generator(seed, step)
        return _loss(vae, clips.batch(generator).to(device), generator, decoder_only)

    loop = Loop(stage, vae, [optimizer], budget, run / f"{stage}.pt", log, 30, decay_from=0.4, ema=0.998)
    loop.run(loss, resume)
    assert loop.averaged is not None
    vae.load_state_dict(loop.averaged.module.state_dict())  # small batches are noisy, their average is not

    vae.eval()
    latents, values = [], []
    with torch.no_grad():
        for _ in range(8):
            x = to_tensor(render(sample_clip(rng), (sizes.resolutions[0],), sizes.frames)[0][None])
            z = vae.encode(x.to(device)).latent_dist.mean
            error = (vae.decode(z).sample.cpu() - x).square().mean()
            latents.append(z.cpu())
            values.append((10 * torch.log10(4 / error)).item())
    z = torch.cat(latents)
    mean, std = z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()
    if decoder_only:
        mean, std = vae.config.latents_mean, vae.config.latents_std
    log.write(stage, psnr_db=float(np.mean(values)), std=[round(value, 3) for value in std])
    state = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}
    save_atomic(run / "vae_final.pt", {"module": state, "mean": mean, "std": std})


def load_vae(run: Path, sizes: Sizes) -> AutoencoderKLWan:
    """The trained autoencoder of a run, in evaluation mode."""
    state = load_state(run / "vae_final.pt", "run --stage vae first")
    vae = build_vae(sizes, state["mean"], state["std"])
    vae.load_state_dict(state["module"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: np.ndarray) -> Tensor:
    """uint8 (B, frames, H, W, 3) to normalised latents, float32 (B, channels, f, H/4, W/4), about unit variance."""
    x = to_tensor(clips).to(next(vae.parameters()).device)
    z = vae.encode(x).latent_dist.mean
    mean, std = (
        torch.tensor(v, device=z.device).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (z - mean) / std
