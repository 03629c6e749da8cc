"""Everything that sets the cost of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that ships; `Sizes.tiny()` is the seconds-long one of the tests."""

    resolutions: tuple[int, ...] = (128, 64, 32)
    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_pictures: int = 4000
    vae_batch: int = 20
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 24
    text_batch: int = 192
    width_heads: int = 4
    head_dim: int = 48
    rope: tuple[int, int, int] = (4, 22, 22)
    double_layers: int = 2
    single_layers: int = 6
    shard_scenes: int = 1000
    scenes: int = 24000
    captions: int = 4
    reader_channels: tuple[int, int, int] = (24, 48, 72)
    reader_scenes: int = 12000
    reader_batch: int = 32
    reader_held_out: int = 1000
    # Scenes per step at each resolution, and how often a step takes it: until the first of `phases` (a share of the
    # budget) and after it. Low resolutions are cheap and carry the meaning; some stay in the mix to the end.
    dit_batch: tuple[int, ...] = (24, 56, 112)
    phases: tuple[tuple[float, tuple[float, ...]], ...] = (
        (0.12, (0.1, 0.6, 0.3)),
        (0.55, (0.62, 0.28, 0.1)),
        (1.0, (0.8, 0.13, 0.07)),
    )

    @staticmethod
    def large() -> Sizes:
        """256 pixels, 1,024 tokens: for going on from a trained model, whose sizes are the two coarse grids here."""
        return Sizes(
            resolutions=(256, 128, 64), scenes=12000, dit_batch=(8, 24, 64),
            phases=((0.5, (0.74, 0.17, 0.09)), (1.0, (0.82, 0.12, 0.06))),
        )  # fmt: skip

    @staticmethod
    def tiny() -> Sizes:
        """A model of a few thousand parameters: exercises every line, learns nothing."""
        return Sizes(
            resolutions=(32, 16), vae_channels=(8, 8, 16), vae_pictures=16, vae_batch=4, text_width=16, text_layers=1,
            text_tokens=24, text_batch=8, width_heads=2, head_dim=16, rope=(4, 6, 6), double_layers=1, single_layers=1,
            shard_scenes=8, scenes=16, captions=2, reader_channels=(4, 4, 8), reader_scenes=16,
            reader_batch=4, reader_held_out=8, dit_batch=(2, 4), phases=((0.3, (0.0, 1.0)), (1.0, (0.7, 0.3))),
        )  # fmt: skip
