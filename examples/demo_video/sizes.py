"""Everything that sets the cost of a training run of the demo video model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """One kind of batch of the transformer's training: latent frames, resolution in pixels, clips a step."""

    resolution: int
    latent_frames: int
    batch: int


@dataclass(frozen=True)
class Sizes:
    """`Sizes.tiny()` is the seconds-long run of the tests."""

    resolutions: tuple[int, ...] = (128, 64, 32)
    frames: int = 13
    vae_width: int = 16
    vae_multipliers: tuple[int, ...] = (1, 2, 4)
    latent_channels: int = 8
    vae_clips: int = 320
    vae_batch: int = 30
    """Frames of a step, in clips of as many frames as one of `vae_frames`."""
    vae_crop: int = 32
    vae_frames: tuple[int, ...] = (1, 5, 9, 13)
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 24
    text_batch: int = 192
    heads: int = 4
    head_dim: int = 48
    layers: int = 8
    feed_forward: int = 768
    shard_clips: int = 100
    large_shards: int = 14
    """Shards with clips at every resolution."""
    small_shards: int = 46
    """Shards without the largest resolution, which takes most of the time to encode."""
    captions: int = 4
    buckets: tuple[Bucket, ...] = (
        Bucket(128, 4, 4), Bucket(128, 1, 16), Bucket(64, 4, 16),
        Bucket(64, 2, 32), Bucket(64, 1, 64), Bucket(32, 4, 64)
    )  # fmt: skip
    phases: tuple[tuple[float, tuple[float, ...]], ...] = (
        (0.10, (0.0, 0.05, 0.15, 0.1, 0.3, 0.4)),
        (0.45, (0.1, 0.1, 0.45, 0.1, 0.1, 0.15)),
        (1.0, (0.72, 0.06, 0.14, 0.03, 0.02, 0.03)),
    )
    """Until which share of the budget -> how often a step takes each bucket."""

    @staticmethod
    def tiny() -> Sizes:
        """A model of a few thousand parameters: exercises every line, learns nothing."""
        return Sizes(
            resolutions=(32, 16), frames=5, vae_width=4, vae_clips=4, vae_batch=5, vae_crop=16, vae_frames=(1, 5),
            latent_channels=4, text_width=16, text_layers=1, text_tokens=32, text_batch=8, heads=2, head_dim=12,
            layers=2, feed_forward=32, shard_clips=4, large_shards=1, small_shards=1, captions=2,
            buckets=(Bucket(32, 2, 2), Bucket(16, 2, 2), Bucket(16, 1, 4)),
            phases=((0.3, (0.0, 0.5, 0.5)), (1.0, (0.6, 0.2, 0.2))),
        )  # fmt: skip

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip: the first frame alone, then four by four."""
        return (self.frames - 1) // 4 + 1
