"""The transformer: a small diffusers `WanTransformer3DModel` and its rectified-flow training."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from examples.demo_model.common import Budget, Loop, RunLog, load_state, step_generator
from examples.demo_model.maps import MapReader

from .clips import ClipStore
from .sizes import Sizes
from .text import build_tokenizer, embed, load_encoder, tokenize

START = "dit_start.pt"
"""File of a run with the weights its training begins from, if there is one."""
FLOW_SHIFT = 3.0

_CAPTION_DROPOUT = 0.08
_MATRIX_RATE, _OTHER_RATE = 5e-3, 2e-3
_MAP_WEIGHT, _MAP_FADES_FROM = 0.3, 0.85


class _Trained(nn.Module):
    """The transformer, and the reader whose loss shapes a middle block and is dropped at the end."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transformer = build_transformer(sizes)
        self.reader = MapReader(sizes.heads * sizes.head_dim)
        self.middle: Tensor | None = None
        self.transformer.blocks[sizes.layers // 2 - 1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.middle = output

    def read(self, maps: Tensor) -> Tensor:
        """Loss of the maps int8 (B, 3, f, h, w), a picture per latent frame."""
        assert self.middle is not None
        frames = maps.shape[2]
        tokens = self.middle.unflatten(1, (frames, -1)).flatten(0, 1)
        loss: Tensor = self.reader.loss(tokens, maps.transpose(1, 2).flatten(0, 1))
        return loss


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
    """Noise levels in (0, 1), float32 (count,): logit-normal, and as evenly as the sampler's shifted steps."""
    normal = torch.sigmoid(torch.randn(count, generator=generator) * 1.1 + 0.4)
    even = torch.rand(count, generator=generator)
    shifted = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)
    return torch.where(torch.rand(count, generator=generator) < 0.5, normal, shifted)


def _optimizers(trained: _Trained) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (modulations, embeddings, output)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trained.transformer.named_parameters():
        (matrices if name.startswith("blocks.") and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        torch.optim.AdamW(trained.reader.parameters(), lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train_dit(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool,
    stop_after: int | None = None,
) -> None:  # fmt: skip
    """Train at all sizes and lengths; the run's `dit.pt` holds weights, their average, optimizers and progress."""
    torch.manual_seed(seed)
    store = ClipStore.load(run, sizes)
    encoder = load_encoder(run, sizes).to(device)
    empty = tokenize(build_tokenizer(sizes), [""], sizes)
    trained = _Trained(sizes).to(device)
    model = trained.transformer
    if (run / START).exists():
        model.load_state_dict(load_state(run / START, ""))

    def loss(step: int, progress: float) -> Tensor:
        generator = step_generator(seed, step)
        shares = next((shares for until, shares in sizes.phases if progress < until), sizes.phases[-1][1])
        bucket = sizes.buckets[int(torch.multinomial(torch.tensor(shares), 1, generator=generator))]
        clean, ids, maps = store.batch(bucket, generator)
        dropped = torch.rand(len(ids), generator=generator) < _CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], empty, ids).to(device)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sample_sigmas(len(ids), generator)
        share = sigma[:, None, None, None, None]
        noisy, target = (1 - share) * clean + share * noise, noise - clean
        with torch.no_grad():
            words = embed(encoder, ids)
        # bfloat16 pays on a GPU; on a CPU without matrix units float32 is faster
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            velocity = model(
                hidden_states=noisy.to(device),
                timestep=(1000 * sigma).to(device),
                encoder_hidden_states=words,
                return_dict=False,
            )[0]
            read = trained.read(maps.to(device))
        fade = min(1.0, (1 - progress) / (1 - _MAP_FADES_FROM))
        return (velocity.float() - target.to(device)).square().mean() + _MAP_WEIGHT * max(fade, 0.0) * read

    loop = Loop(
        "dit", trained, _optimizers(trained), budget, run / "dit.pt", log,
        lr_warmup_steps=100, decay_from=0.65, ema=0.999
    )  # fmt: skip
    loop.run(loss, resume, stop_after)


def load_transformer(run: Path, sizes: Sizes) -> WanTransformer3DModel:
    """The averaged weights of a run's last checkpoint, in evaluation mode."""
    state = load_state(run / "dit.pt", "run --stage dit first")
    trained = _Trained(sizes)
    trained.load_state_dict(state["averaged"])
    return trained.transformer.eval().requires_grad_(False)
