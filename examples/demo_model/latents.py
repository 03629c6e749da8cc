"""The cached training set: scenes painted and encoded once, at every resolution, in shards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from examples.training.loop import RunLog, load_state, save_atomic

from .maps import draw_maps
from .scenes import caption, render_pyramid, sample_scene
from .sizes import Sizes
from .text import build_tokenizer, tokenize
from .vae import encode, load_vae

_CHUNK = 50


def draw_shard(seed: int, index: int, sizes: Sizes) -> tuple[list[np.ndarray], list[str]]:
    """One shard's pictures, uint8 (S, H, W, 3) for every resolution, and `captions` captions a scene in turn."""
    rng = Random(f"{seed} shard {index}")
    pictures, captions = [], []
    for _ in range(sizes.shard_scenes):
        scene = sample_scene(rng)
        pictures.append(render_pyramid(scene, sizes.resolutions))
        captions += [caption(scene, rng) for _ in range(sizes.captions)]
    return [np.stack([picture[i] for picture in pictures]) for i in range(len(sizes.resolutions))], captions


def _shard_path(run: Path, folder: str, index: int) -> Path:
    return run / folder / f"shard_{index:05d}.pt"


def _missing(run: Path, folder: str, sizes: Sizes) -> list[int]:
    return [i for i in range(sizes.scenes // sizes.shard_scenes) if not _shard_path(run, folder, i).exists()]


def make_maps(run: Path, sizes: Sizes, seed: int) -> None:
    """Write the maps of every shard that lacks them, from the seed its scenes were drawn from."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as painters:
        jobs = [(i, painters.submit(draw_maps, seed, i, sizes)) for i in _missing(run, "maps", sizes)]
        for index, job in jobs:
            save_atomic(_shard_path(run, "maps", index), job.result())


def make_latents(run: Path, sizes: Sizes, log: RunLog, seed: int, device: str) -> None:
    """Draw and encode every shard that is missing; another process paints while this one encodes."""
    make_maps(run, sizes, seed)
    vae = load_vae(run, sizes).to(device)
    tokenizer = build_tokenizer(sizes)
    # Spawned, not forked: a fork would inherit torch's thread pool in an undefined state.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as painter:
        jobs = [(i, painter.submit(draw_shard, seed, i, sizes)) for i in _missing(run, "latents", sizes)]
        for index, job in jobs:
            pictures, captions = job.result()
            ids = tokenize(tokenizer, captions, sizes).to(torch.uint8)
            latents = [torch.cat([encode(vae, chunk).half().cpu() for chunk in _chunks(pool)]) for pool in pictures]
            ids = ids.unflatten(0, (sizes.shard_scenes, sizes.captions))
            save_atomic(_shard_path(run, "latents", index), {"latents": latents, "ids": ids})
            log.write("latents", shard=index, std=[round(z.float().std().item(), 3) for z in latents])


def _chunks(pool: np.ndarray) -> Iterator[np.ndarray]:
    return (pool[i : i + _CHUNK] for i in range(0, len(pool), _CHUNK))


@dataclass
class LatentStore:
    """All shards in memory, per resolution r: `latents[r]` float16 (S, 4, h, w), `maps[r]` int8 (S, 3, h, w).

    `ids` is uint8 (S, captions, tokens); `maps` is what `maps.scene_map` describes.
    """

    latents: list[Tensor]
    maps: list[Tensor]
    ids: Tensor

    @staticmethod
    def load(run: Path, sizes: Sizes) -> LatentStore:
        """Read every shard of a run."""
        paths = sorted((run / "latents").glob("shard_*.pt"))
        if not paths:
            raise FileNotFoundError(f"{run / 'latents'} holds no shard: run --stage latents first")
        shards = [load_state(path, "run --stage latents first") for path in paths]
        latents = [torch.cat([shard["latents"][i] for shard in shards]) for i in range(len(sizes.resolutions))]
        drawn = [load_state(_shard_path(run, "maps", i), "run --stage latents first") for i in range(len(paths))]
        maps = [torch.cat([shard[i] for shard in drawn]) for i in range(len(sizes.resolutions))]
        return LatentStore(latents, maps, torch.cat([shard["ids"] for shard in shards]))

    def batch(self, resolution: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`count` random scenes: latents float32 (count, 4, h, w), a caption int64 (count, tokens), maps."""
        scenes, captions, _ = self.ids.shape
        chosen = torch.randint(scenes, (count,), generator=generator)
        which = torch.randint(captions, (count,), generator=generator)
        return self.latents[resolution][chosen].float(), self.ids[chosen, which].long(), self.maps[resolution][chosen]
