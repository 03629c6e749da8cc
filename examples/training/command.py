"""The command line of a training: its stages and what all of them are given."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .loop import Budget, RunLog, of_processes


@dataclass(frozen=True)
class Run:
    """What a stage is given.

    Attributes:
        folder: Checkpoints, cached training set, log.
        sizes: Of the model and its training.
        log: Of the run.
        seed: Of every random number.
        device: "cpu" or "cuda".
        resume: Go on from the run's checkpoints.
        options: As parsed.
    """

    folder: Path
    sizes: Any
    log: RunLog
    seed: int
    device: str
    resume: bool
    options: argparse.Namespace

    @property
    def model(self) -> Path:
        """Folder of the exported pipeline."""
        return self.options.export_to or self.folder / "model"

    def budget(self, stage: str) -> Budget:
        """How long a stage trains."""
        if self.options.steps is not None:
            return Budget(steps=self.options.steps)
        return Budget(minutes=getattr(self.options, "minutes" if stage == "dit" else f"{stage}_minutes"))

    def given(self, stage: str) -> tuple[Path, Any, Budget, RunLog, int, str, bool]:
        """Arguments of a training function."""
        if stage == "dit":
            told = {"seed": self.seed, "device": self.device, "minutes": self.options.minutes}
            self.log.write("dit", **told, torch=torch.__version__)
        return self.folder, self.sizes, self.budget(stage), self.log, self.seed, self.device, self.resume


Stage = Callable[[Run], object]


def parser_of(module: str, text: str | None, stages: Sequence[str], minutes: Mapping[str, float]) -> Any:
    """Options of a training.

    Args:
        module: Name of the program, as in ``python -m examples.demo_model.train``.
        text: Its docstring.
        stages: Names, in order.
        minutes: Stage -> how long it trains if nobody says otherwise.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=text)
    parser.add_argument("--out", type=Path, required=True, help="run directory: checkpoints, training set, log")
    for stage, budget in minutes.items():
        option = "--minutes" if stage == "dit" else f"--{stage}-minutes"
        parser.add_argument(option, type=float, default=budget, help=f"wall-clock training time of the {stage} stage")
    parser.add_argument("--steps", type=int, help="train every stage for this many steps instead of minutes")
    parser.add_argument("--stage", choices=stages, action="append", help="run only these stages (default: all)")
    parser.add_argument("--start-from", type=Path, help="an exported pipeline whose weights an empty run begins with")
    parser.add_argument("--export-to", type=Path, help="folder of the export stage (default: RUN/model)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoints")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the command")
    return parser


def run_stages(
    options: argparse.Namespace,
    sizes: Any,
    stages: Mapping[str, Stage],
    start: Callable[[Path, Path], None],
) -> None:
    """Runs the chosen stages.

    Args:
        options: Of :func:`parser_of`.
        sizes: Of the model.
        stages: Name -> what to do, in order.
        start: Gives a run folder (second) the weights of an exported pipeline (first).
    """
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together and (options.stage != ["dit"] or options.device != "cpu"):
        raise SystemExit("several processes train the transformer together on CPUs: give them --stage dit alone")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is available; leave the option out to train on the CPU")
    torch.set_num_threads(options.threads)
    if together:
        dist.init_process_group("gloo")
    options.out.mkdir(parents=True, exist_ok=True)
    log = RunLog(options.out / "training_log.jsonl")
    if options.start_from is not None and of_processes()[0] == 0:
        start(options.start_from, options.out)
    if together:
        dist.barrier()
    run = Run(options.out, sizes, log, options.seed, options.device, options.resume, options)
    for stage in options.stage or stages:
        stages[stage](run)
    if together:
        dist.destroy_process_group()
