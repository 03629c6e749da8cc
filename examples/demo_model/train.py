"""Trains the demo model: `python -m examples.demo_model.train --out RUN --minutes 90`.

Stages, each resumable and runnable alone: `vae` (autoencoder), `text` (encoders), `latents` (the cached training set),
`dit` (the transformer; `--minutes` is its budget), `decoder` (the autoencoder's decoder again, against the same
latents), `reader` (the network by which evaluation reads pictures; it needs no other stage), `export` (a diffusers
pipeline), `check` (at each size 10 against 50 steps, adherence and a grid; what coarse runs tell of full ones). On a
GPU pass `--device cuda` and a longer budget; the seed and the log make a run traceable. `--tiny --steps 2` tries every
stage within a minute.

Several processes, on CPUs a core each, average their gradients: `torchrun --standalone --nproc_per_node 2 -m
examples.demo_model.train --out RUN --stage dit --threads 1 --resume`, begun or gone on with by any number of them.

Everything is written below RUN. What ships with the package was written by `--export-to ddit_rt/demo/model` and
`--reader-to ddit_rt/evaluate/adherence/reader.safetensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddit_rt.demo import DEMO_PROMPTS
from examples.training.command import Run, Stage, parser_of, run_stages

from .dit import train_dit
from .export import adopt, check, export
from .latents import make_latents
from .reader.training import train_reader
from .sizes import Sizes
from .text import train_text
from .vae import train_vae

MINUTES = {"dit": 90.0, "vae": 10.0, "decoder": 6.0, "text": 3.0, "reader": 20.0}
_MORE_PROMPTS = (
    "a dotted pink heart",
    "a zebra on a green background",
    "a checked red fish and an orange tree",
    "a house behind a fence",
    "many purple rings",
    "a green triangle and a striped white square on a gradient background",
)


def _reader(run: Run) -> None:
    train_reader(*run.given("reader"), run.options.reader_to or run.folder / "reader.safetensors")


def _check(run: Run) -> None:
    prompts = [*DEMO_PROMPTS.values(), *_MORE_PROMPTS]
    check(run.model, run.sizes.resolutions, run.folder, run.log, prompts, seeds=4, steps=(10, 50))


STAGES: dict[str, Stage] = {
    "vae": lambda run: train_vae(*run.given("vae")),
    "text": lambda run: train_text(*run.given("text")),
    "latents": lambda run: make_latents(run.folder, run.sizes, run.log, run.seed, run.device),
    "dit": lambda run: train_dit(*run.given("dit"), run.options.compile),
    "decoder": lambda run: train_vae(*run.given("decoder"), decoder_only=True),
    "reader": _reader,
    "export": lambda run: export(run.folder, run.sizes, run.model),
    "check": _check,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen stages."""
    parser = parser_of("examples.demo_model.train", __doc__, list(STAGES), MINUTES)
    parser.add_argument("--reader-to", type=Path, help="file of the reader stage (default: RUN/reader.safetensors)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer (dit stage)")
    parser.add_argument("--large", action="store_true", help="256 pixels instead of 128; with --start-from")
    options = parser.parse_args(arguments)
    sizes = Sizes.tiny() if options.tiny else Sizes.large() if options.large else Sizes()
    run_stages(options, sizes, STAGES, adopt)


if __name__ == "__main__":
    main()
