"""Pictures of unfinished latents, by a linear decoder that learns from finished ones."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional

WINDOW = 3
"""Latent pixels that a patch of the picture is made from, a side."""
DETAIL = 4
"""Most pixels of a preview along the side of a latent pixel."""
ENOUGH = 24
"""Pictures to learn from."""
POSITIONS = 4096
"""Latent pixels looked at in each of them."""


class PreviewDecoder:
    """Least squares from windows of 3 x 3 latent pixels to patches of the picture.

    A VAE's decoder costs as much as some denoising steps, has to be fed in its own scaling and knows nothing of half
    done latents. This costs one small product, works for every family, and is learnt from what the server draws anyway:
    the first picture of a warm-up is enough for a legible preview, and the next ones refine it.

    Not safe for several threads.
    """

    def __init__(self) -> None:
        self._products: tuple[torch.Tensor, torch.Tensor] | None = None
        self._weight: torch.Tensor | None = None
        self._detail = 1
        self.learnt = 0

    def learn(self, clean: torch.Tensor, picture: np.ndarray) -> None:
        """Takes in a finished latent and its picture; after :data:`ENOUGH` of them it does nothing.

        Args:
            clean: float (C, H, W).
            picture: float (height, width, 3) in [0, 1], its sides whole multiples of the latent's.
        """
        if self.learnt >= ENOUGH:
            return
        rows, columns = clean.shape[-2:]
        detail = min(DETAIL, picture.shape[0] // rows)
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].double()
        small = functional.interpolate(pixels, (rows * detail, columns * detail), mode="area")[0]
        wanted = rearrange(small, "c (h p) (w q) -> (h w) (c p q)", p=detail, q=detail)
        seen = _windows(clean.cpu().double())
        if len(seen) > POSITIONS:
            chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(self.learnt))[:POSITIONS]
            seen, wanted = seen[chosen], wanted[chosen]
        products = seen.T @ seen, seen.T @ wanted
        if self._products is not None and detail == self._detail:
            products = products[0] + self._products[0], products[1] + self._products[1]
        self._products, self._detail = products, detail
        self.learnt += 1
        gram = products[0]
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self._weight = torch.linalg.solve(gram + ridge, products[1])

    def decode(self, clean: torch.Tensor) -> np.ndarray | None:
        """The picture that a latent stands for.

        Args:
            clean: float (C, H, W).

        Returns:
            uint8 (H·d, W·d, 3), d the detail; None before anything was learnt.
        """
        if self._weight is None:
            return None
        rows, columns = clean.shape[-2:]
        patches = _windows(clean.float()) @ self._weight.to(clean.device, torch.float32)
        sides = {"h": rows, "w": columns, "p": self._detail, "q": self._detail}
        picture = rearrange(patches, "(h w) (c p q) -> (h p) (w q) c", **sides)
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _windows(latent: torch.Tensor) -> torch.Tensor:
    """(C, H, W) -> (H·W, C·9 + 1): the window around every latent pixel, edges repeated, and a constant."""
    padded = functional.pad(latent[None], (WINDOW // 2,) * 4, mode="replicate")
    windows = functional.unfold(padded, WINDOW)[0].T
    return torch.cat([windows, windows.new_ones(len(windows), 1)], dim=1)


def middle_frame(latent_frames: int, frames: int) -> tuple[int, int]:
    """A latent frame in the middle of a video, and the frame it stands for.

    The first latent frame of a causal video autoencoder is the first frame; each further one stands for several.
    """
    if latent_frames == 1:
        return 0, 0
    each = (frames - 1) // (latent_frames - 1)
    chosen = latent_frames // 2
    return chosen, 1 + (chosen - 1) * each + each // 2


class Pace:
    """How far a run is by the clock, after how many steps: full steps take long, and lie early.

    Learnt from runs with the same settings; before the first, from any run, else evenly.
    """

    def __init__(self) -> None:
        self._known: dict[object, np.ndarray] = {}
        self._last: np.ndarray | None = None

    def learn(self, settings: object, seconds: list[float]) -> None:
        """Takes in the seconds of every step of a run."""
        passed = np.cumsum([0.0, *seconds])
        if passed[-1] > 0:
            self._known[settings] = self._last = passed / passed[-1]
        while len(self._known) > 256:
            self._known.pop(next(iter(self._known)))

    def passed(self, settings: object, done: int, steps: int) -> float:
        """Share of the denoising time that has passed when ``done`` of ``steps`` steps have."""
        curve = self._known.get(settings, self._last)
        if curve is None:
            return done / steps
        return float(np.interp(done / steps, np.linspace(0, 1, len(curve)), curve))


PARTIALS = {1: (0.2,), 2: (0.2, 0.6), 3: (0.2, 0.45, 0.7)}
"""Previews wanted -> shares of the denoising time at which they are made."""
