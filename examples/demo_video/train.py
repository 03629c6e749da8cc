"""Trains the demo video model: `python -m examples.demo_video.train --out RUN --minutes 240`.

Stages, each resumable and runnable alone: `vae` (autoencoder), `text` (encoder), `clips` (the cached training set),
`dit` (the transformer; `--minutes` is its budget), `decoder` (the autoencoder's decoder again, against the same
latents), `export` (a diffusers pipeline), `check` (10 against 50 steps and a sheet of frames). On a GPU pass `--device
cuda` and a longer budget; the seed and the log make a run traceable. `--tiny --steps 2` tries every stage within a
minute.

Several processes, on CPUs a core each, average their gradients: `torchrun --standalone --nproc_per_node 2 -m
examples.demo_video.train --out RUN --stage dit --threads 1 --resume`, begun or gone on with by any number of them.

Everything is written below RUN. What ships with the package was written by `--export-to ddit_rt/demo/video_model`.
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.training.command import Run, Stage, parser_of, run_stages

from .clips import make_clips
from .dit import train_dit
from .export import PROMPTS, adopt, check, export
from .sizes import Sizes
from .text import train_text
from .vae import train_vae

MINUTES = {"dit": 240.0, "vae": 60.0, "decoder": 10.0, "text": 3.0}
_MORE_PROMPTS = (
    "a blue house grows on a yellow background",
    "a pink heart circles on a gradient background",
    "an orange triangle moves up behind a striped black square",
    "a white tree and a green ball bounces on a red background",
)


def _check(run: Run) -> None:
    prompts, seeds = [*PROMPTS.values(), *_MORE_PROMPTS], 1 if run.options.steps else 2
    check(run.model, run.sizes, run.folder / "check.png", run.log, prompts, seeds, steps=(10, 50))


STAGES: dict[str, Stage] = {
    "vae": lambda run: train_vae(*run.given("vae")),
    "text": lambda run: train_text(*run.given("text")),
    "clips": lambda run: make_clips(run.folder, run.sizes, run.log, run.seed, run.device),
    "dit": lambda run: train_dit(*run.given("dit")),
    "decoder": lambda run: train_vae(*run.given("decoder"), decoder_only=True),
    "export": lambda run: export(run.folder, run.sizes, run.model),
    "check": _check,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen stages."""
    options = parser_of("examples.demo_video.train", __doc__, list(STAGES), MINUTES).parse_args(arguments)
    run_stages(options, Sizes.tiny() if options.tiny else Sizes(), STAGES, adopt)


if __name__ == "__main__":
    main()
