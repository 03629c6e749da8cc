"""How the demo models' transformers are trained: what they are made to read, their optimizers, the loss of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .loop import Budget, Loop, RunLog, load_state

CHECKPOINT, START = "dit.pt", "dit_start.pt"
"""Files of a run: the training's checkpoint, and the weights that it begins from, if there are any."""

_CAPTION_DROPOUT = 0.08
_MATRIX_RATE, _OTHER_RATE = 5e-3, 2e-3
_MAP_WEIGHT, _MAP_FADES_FROM = 0.3, 0.85
_TURNS = 2**40  # random numbers apart from those of a step's batch


class Trained(nn.Module):
    """A transformer, and the reader of a middle block whose loss shapes it and which is dropped at the end.

    Args:
        transformer: To train.
        block: One of its blocks.
        reader: Of the block's output.
        tokens_of: A block's output -> what the reader is given.
    """

    def __init__(
        self, transformer: nn.Module, block: nn.Module, reader: nn.Module, tokens_of: Callable[[Any], Tensor]
    ) -> None:
        super().__init__()
        self.transformer, self.reader = transformer, reader
        self._middle: Tensor | None = None
        self._tokens_of = tokens_of
        block.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self._middle = self._tokens_of(output)

    @property
    def middle(self) -> Tensor:
        """What the reader is given of the last run."""
        assert self._middle is not None
        return self._middle


def optimizers(trained: Trained, is_matrix: Callable[[str, nn.Parameter], bool]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (modulations, embeddings, output)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trained.transformer.named_parameters():
        (matrices if is_matrix(name, parameter) else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        torch.optim.AdamW(trained.reader.parameters(), lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def levels(count: int, generator: torch.Generator, mean: float, shift: float, normals: float) -> Tensor:
    """Noise levels in (0, 1), float32 (count,): logit-normal ones, and such as lie where the sampler's steps do.

    Args:
        count: How many.
        generator: Of the random numbers.
        mean: Of the logit.
        shift: Of the sampler's noise levels.
        normals: Share of the former.
    """
    normal = torch.sigmoid(torch.randn(count, generator=generator) * 1.1 + mean)
    even = torch.rand(count, generator=generator)
    shifted = shift * even / (1 + (shift - 1) * even)
    return torch.where(torch.rand(count, generator=generator) < normals, normal, shifted)


@dataclass(frozen=True)
class Noised:
    """A batch on the way to noise.

    Attributes:
        sigma: (B,) noise levels.
        noisy: (B, ...) (1 - σ) z + σ ε.
        velocity: (B, ...) ε - z, what is to be predicted.
    """

    sigma: Tensor
    noisy: Tensor
    velocity: Tensor

    @classmethod
    def of(cls, clean: Tensor, sigmas: Callable[[int, torch.Generator], Tensor], generator: torch.Generator) -> Noised:
        """Noises latents (B, ...) at levels that ``sigmas`` draws."""
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sigmas(len(clean), generator)
        share = sigma.reshape(-1, *[1] * (clean.ndim - 1))
        return cls(sigma, (1 - share) * clean + share * noise, noise - clean)


def turn_of(phases: Any, progress: float, seed: int, step: int) -> int:
    """Which kind of batch a step takes, the same in all processes, so that none waits for another.

    ``phases`` are shares of the budget, and how often a step takes each kind.
    """
    shares = next((shares for until, shares in phases if progress < until), phases[-1][1])
    generator = torch.Generator().manual_seed(_TURNS + seed * 1_000_003 + step)
    return int(torch.multinomial(torch.tensor(shares), 1, generator=generator))


def without_some(ids: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Token ids (B, n), a few of the captions left out for guidance."""
    dropped = torch.rand(len(ids), generator=generator) < _CAPTION_DROPOUT
    return torch.where(dropped[:, None], empty, ids)


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the device multiplies it faster than float32: GPUs, and CPUs with instructions for it.

    Of one with AVX-512's a step takes two thirds; of one without, 1.5 to 1.8 times as long.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of torch tell
    fast = device != "cpu" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast)


def loss_of(velocity: Tensor, wanted: Tensor, read: Tensor, progress: float) -> Tensor:
    """Of a step: mean square of what is missed, and the reader's loss, which fades towards the end."""
    fade = min(1.0, (1 - progress) / (1 - _MAP_FADES_FROM))
    return (velocity.float() - wanted).square().mean() + _MAP_WEIGHT * max(fade, 0.0) * read


def train(
    trained: Trained, loss: Callable[[int, float], Tensor], is_matrix: Callable[[str, nn.Parameter], bool],
    run: Path, budget: Budget, log: RunLog, resume: bool, stop_after: int | None,
) -> None:  # fmt: skip
    """The run's `dit.pt` will hold weights, their average, optimizers and progress."""
    loop = Loop(
        "dit", trained, optimizers(trained, is_matrix), budget, run / CHECKPOINT, log,
        lr_warmup_steps=100, decay_from=0.65, ema=0.999
    )  # fmt: skip
    loop.run(loss, resume, stop_after)


def begin(trained: Trained, run: Path) -> None:
    """Gives the transformer the weights that a run begins from, if there are any."""
    if (run / START).exists():
        trained.transformer.load_state_dict(load_state(run / START, ""))


def averaged(trained: Trained, run: Path) -> nn.Module:
    """The transformer with the averaged weights of a run's last checkpoint, in evaluation mode."""
    trained.load_state_dict(load_state(run / CHECKPOINT, "run --stage dit first")["averaged"])
    return trained.transformer.eval().requires_grad_(False)
