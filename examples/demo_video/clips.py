"""The cached training set: clips painted and encoded once, at every resolution, in shards."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from examples.demo_model.maps import scene_map
from examples.training.loop import RunLog, load_state, save_atomic

from .scenes import CLIP_FRAMES, Clip, caption, render, sample_clip
from .sizes import Bucket, Sizes
from .text import build_tokenizer, tokenize
from .vae import encode, load_vae

_CHUNK = 4


@dataclass
class Drawn:
    """One shard before encoding: frames per resolution, uint8 (S, frames, side, side, 3); captions; maps."""

    clips: dict[int, np.ndarray]
    captions: list[str]
    maps: dict[int, np.ndarray]
    """Resolution -> int8 (S, 3, f, n, n) of `examples.demo_model.maps.scene_map`, one per latent frame."""


def draw_shard(seed: int, index: int, sizes: Sizes) -> Drawn:
    """Draw one shard; the first `large_shards` have every resolution, the others all but the largest."""
    rng = Random(f"{seed} shard {index}")
    resolutions = sizes.resolutions if index < sizes.large_shards else sizes.resolutions[1:]
    painted, captions, maps = [], [], []
    for _ in range(sizes.shard_clips):
        clip = sample_clip(rng)
        painted.append(render(clip, resolutions, sizes.frames))
        captions += [caption(clip, rng) for _ in range(sizes.captions)]
        maps.append(clip_maps(clip, tuple(resolution // 4 for resolution in resolutions), sizes.latent_frames))
    return Drawn(
        {r: np.stack([clip[i] for clip in painted]) for i, r in enumerate(resolutions)},
        captions,
        {r: np.stack([clip[i] for clip in maps]) for i, r in enumerate(resolutions)},
    )


def clip_maps(clip: Clip, sides: tuple[int, ...], latent_frames: int) -> list[np.ndarray]:
    """Per side n, int8 (3, f, n, n): what covers each latent pixel in the middle of what the latent frame holds."""
    times = [0.0] + [(4 * frame - 1.5) / (CLIP_FRAMES - 1) for frame in range(1, latent_frames)]
    frames = [scene_map(clip.at(time), sides) for time in times]
    return [np.stack([frame[i] for frame in frames], axis=1) for i in range(len(sides))]


def _path(run: Path, index: int) -> Path:
    return run / "clips" / f"shard_{index:05d}.pt"


def make_clips(run: Path, sizes: Sizes, log: RunLog, seed: int, device: str) -> None:
    """Draw and encode every shard that is missing; another process paints while this one encodes."""
    vae = load_vae(run, sizes).to(device)
    tokenizer = build_tokenizer(sizes)
    missing = [i for i in range(sizes.large_shards + sizes.small_shards) if not _path(run, i).exists()]
    # Spawned, not forked: a fork would inherit torch's thread pool in an undefined state.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as painter:
        ahead = [painter.submit(draw_shard, seed, i, sizes) for i in missing[:2]]
        for place, index in enumerate(missing):
            drawn = ahead.pop(0).result()
            if place + 2 < len(missing):
                ahead.append(painter.submit(draw_shard, seed, missing[place + 2], sizes))
            ids = tokenize(tokenizer, drawn.captions, sizes).to(torch.uint8)
            latents = {
                resolution: torch.cat(
                    [encode(vae, pool[i : i + _CHUNK]).half().cpu() for i in range(0, len(pool), _CHUNK)]
                )
                for resolution, pool in drawn.clips.items()
            }
            state = {
                "latents": latents,
                "ids": ids.unflatten(0, (sizes.shard_clips, sizes.captions)),
                "maps": {resolution: torch.from_numpy(maps) for resolution, maps in drawn.maps.items()},
            }
            save_atomic(_path(run, index), state)
            log.write("clips", shard=index, std=[round(z.float().std().item(), 3) for z in latents.values()])


@dataclass
class ClipStore:
    """All shards in memory, per resolution: latents float16 (S, C, f, h, w), maps int8, ids uint8 (S, captions, n)."""

    latents: dict[int, Tensor]
    maps: dict[int, Tensor]
    ids: dict[int, Tensor]

    @staticmethod
    def load(run: Path, sizes: Sizes) -> ClipStore:
        """Read every shard of a run."""
        paths = sorted((run / "clips").glob("shard_*.pt"))
        if not paths:
            raise FileNotFoundError(f"{run / 'clips'} holds no shard: run --stage clips first")
        shards = [load_state(path, "run --stage clips first") for path in paths]
        store = ClipStore({}, {}, {})
        for resolution in sizes.resolutions:
            having = [shard for shard in shards if resolution in shard["latents"]]
            store.latents[resolution] = torch.cat([shard["latents"][resolution] for shard in having])
            store.maps[resolution] = torch.cat([shard["maps"][resolution] for shard in having])
            store.ids[resolution] = torch.cat([shard["ids"] for shard in having])
        return store

    def batch(self, bucket: Bucket, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random clips: latents float32 (batch, C, f, h, w), a caption int64 (batch, tokens), maps (batch, 3, f, h, w).

        The autoencoder is causal, so the first latent frames of a clip are those of a shorter clip.
        """
        latents, maps, ids = (part[bucket.resolution] for part in (self.latents, self.maps, self.ids))
        chosen = torch.randint(len(latents), (bucket.batch,), generator=generator)
        which = torch.randint(ids.shape[1], (bucket.batch,), generator=generator)
        frames = slice(0, bucket.latent_frames)
        return latents[chosen, :, frames].float(), ids[chosen, which].long(), maps[chosen, :, frames]
