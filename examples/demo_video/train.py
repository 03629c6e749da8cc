"""Trains the demo video model: `python -m examples.demo_video.train --out RUN --minutes 240`.

Stages, each resumable and runnable alone: `vae` (autoencoder), `text` (encoder), `clips` (the cached training set),
`dit` (the transformer; `--minutes` is its budget), `decoder` (the autoencoder's decoder again, against the same
latents), `export` (a diffusers pipeline), `check` (10 against 50 steps and a sheet of frames). On a GPU pass `--device
cuda` and a longer budget; the seed and the log make a run traceable. `--tiny --steps 2` tries every stage within a
minute.

Everything is written below RUN. What ships with the package was written by `--export-to ddit_rt/demo/video_model`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.demo_model.common import Budget, RunLog

from .clips import make_clips
from .dit import train_dit
from .export import PROMPTS, adopt, check, export
from .sizes import Sizes
from .text import train_text
from .vae import train_vae

STAGES = ("vae", "text", "clips", "dit", "decoder", "export", "check")
_MORE_PROMPTS = (
    "a blue house grows on a yellow background",
    "a pink heart circles on a gradient background",
    "an orange triangle moves up behind a striped black square",
    "a white tree and a green ball bounces on a red background",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_video.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="run directory: checkpoints, cached clips, log")
    parser.add_argument("--minutes", type=float, default=240.0, help="wall-clock training time of the dit stage")
    parser.add_argument("--vae-minutes", type=float, default=20.0)
    parser.add_argument("--decoder-minutes", type=float, default=10.0)
    parser.add_argument("--text-minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, help="train every stage for this many steps instead of minutes")
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only these stages (default: all)")
    parser.add_argument("--start-from", type=Path, help="an exported pipeline whose weights an empty run begins with")
    parser.add_argument("--export-to", type=Path, help="folder of the export stage (default: RUN/model)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoints")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the command")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen stages."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is available; leave the option out to train on the CPU")
    torch.set_num_threads(options.threads)
    sizes = Sizes.tiny() if options.tiny else Sizes()
    run, seed, device, resume = options.out, options.seed, options.device, options.resume
    model = options.export_to or run / "model"
    run.mkdir(parents=True, exist_ok=True)
    log = RunLog(run / "training_log.jsonl")
    if options.start_from is not None:
        adopt(options.start_from, run)

    def budget(minutes: float) -> Budget:
        return Budget(steps=options.steps) if options.steps else Budget(minutes=minutes)

    for stage in options.stage or STAGES:
        if stage == "vae":
            train_vae(run, sizes, budget(options.vae_minutes), log, seed, device, resume)
        elif stage == "decoder":
            train_vae(run, sizes, budget(options.decoder_minutes), log, seed, device, resume, decoder_only=True)
        elif stage == "text":
            train_text(run, sizes, budget(options.text_minutes), log, seed, device, resume)
        elif stage == "clips":
            make_clips(run, sizes, log, seed, device)
        elif stage == "dit":
            log.write("dit", seed=seed, device=device, minutes=options.minutes, torch=torch.__version__)
            train_dit(run, sizes, budget(options.minutes), log, seed, device, resume)
        elif stage == "export":
            export(run, sizes, model)
        else:
            prompts = [*PROMPTS.values(), *_MORE_PROMPTS]
            check(model, sizes, run / "check.png", log, prompts, seeds=1 if options.steps else 2, steps=(10, 50))


if __name__ == "__main__":
    main()
