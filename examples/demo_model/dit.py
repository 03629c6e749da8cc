"""The demo's transformer: a small diffusers `FluxTransformer2DModel` and its rectified-flow training."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from .common import Budget, Loop, RunLog, Sizes, load_state, step_generator
from .latents import LatentStore
from .maps import MapReader
from .text import build_tokenizer, load_encoders, tokenize

LATENT_CHANNELS = 4
START = "dit_start.pt"
"""File of a run with the weights its training begins from, if there is one."""

_CAPTION_DROPOUT = 0.08
_MATRIX_RATE, _OTHER_RATE = 5e-3, 2e-3
_MAP_WEIGHT, _MAP_FADES_FROM = 0.3, 0.85


class _Trained(nn.Module):
    """The transformer, and the reader whose loss shapes its middle blocks and is dropped at the end."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transformer = build_transformer(sizes)
        self.reader = MapReader(sizes.width_heads * sizes.head_dim)
        self.middle: Tensor | None = None
        blocks = self.transformer.single_transformer_blocks
        blocks[max(0, len(blocks) // 3 - 1)].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        self.middle = output[1]


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
    """Noise levels in (0, 1), float32 (count,): mostly logit-normal, the rest as evenly as the sampler steps."""
    normal = torch.sigmoid(torch.randn(count, generator=generator) * 1.1 + 0.2)
    even = torch.rand(count, generator=generator)
    # The scheduler's shift at 256 tokens (mu = 0.5): time is spent where the steps are.
    shift = torch.tensor(0.5).exp()
    shifted = shift * even / (1 + (shift - 1) * even)
    return torch.where(torch.rand(count, generator=generator) < 0.6, normal, shifted)


def _optimizers(trained: _Trained) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (modulations, embeddings, output)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trained.transformer.named_parameters():
        inside = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        torch.optim.AdamW(trained.reader.parameters(), lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train_dit(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool,
    compile_model: bool = False, stop_after: int | None = None,
) -> None:  # fmt: skip
    """Train at all resolutions; the run's `dit.pt` holds weights, their average, optimizers and progress."""
    torch.manual_seed(seed)
    store = LatentStore.load(run, sizes)
    clip, t5 = (encoder.to(device) for encoder in load_encoders(run, sizes))
    empty = tokenize(build_tokenizer(sizes), [""], sizes)
    trained = _Trained(sizes).to(device)
    model = trained.transformer
    if (run / START).exists():
        model.load_state_dict(load_state(run / START, ""))
    # Autocast would carry the timestep in bfloat16 (3 digits of 1000 sigma) from the embedded tokens' dtype.
    model.x_embedder.register_forward_hook(lambda _module, _inputs, output: output.float())
    forward = torch.compile(model, dynamic=False) if compile_model else model
    text_ids = torch.zeros(sizes.text_tokens, 3, device=device)

    def loss(step: int, progress: float) -> Tensor:
        generator = step_generator(seed, step)
        shares = next((shares for until, shares in sizes.phases if progress < until), sizes.phases[-1][1])
        resolution = int(torch.multinomial(torch.tensor(shares), 1, generator=generator))
        clean, ids, maps = store.batch(resolution, sizes.dit_batch[resolution], generator)
        dropped = torch.rand(len(ids), generator=generator) < _CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], empty, ids).to(device)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sample_sigmas(len(ids), generator)
        share = sigma[:, None, None, None]
        noisy, target = pack((1 - share) * clean + share * noise), pack(noise - clean)
        with torch.no_grad():
            pooled, words = clip(ids).pooler_output, t5(ids)[0]
        # bfloat16 pays on a GPU; on a CPU without matrix units it takes 1.5 to 1.8 times as long as float32
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            velocity = forward(
                hidden_states=noisy.to(device),
                timestep=sigma.to(device),
                encoder_hidden_states=words,
                pooled_projections=pooled,
                txt_ids=text_ids,
                img_ids=image_ids(clean.shape[2] // 2, clean.shape[3] // 2, torch.device(device)),
                return_dict=False,
            )[0]
            assert trained.middle is not None
            read = trained.reader.loss(trained.middle, maps.to(device))
        fade = min(1.0, (1 - progress) / (1 - _MAP_FADES_FROM))
        return (velocity.float() - target.to(device)).square().mean() + _MAP_WEIGHT * max(fade, 0.0) * read

    loop = Loop(
        "dit", trained, _optimizers(trained), budget, run / "dit.pt", log,
        lr_warmup_steps=100, decay_from=0.65, ema=0.999
    )  # fmt: skip
    loop.run(loss, resume, stop_after)


def load_transformer(run: Path, sizes: Sizes) -> FluxTransformer2DModel:
    """The averaged weights of a run's last checkpoint, in evaluation mode."""
    state = load_state(run / "dit.pt", "run --stage dit first")
    trained = _Trained(sizes)
    trained.load_state_dict(state["averaged"])
    return trained.transformer.eval().requires_grad_(False)
