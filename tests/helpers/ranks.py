"""Context parallelism on a CPU: runs of tiny pipelines on gloo ranks, forked from one process that imports once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from specimens import SPECIMENS
from tiny import latents_of

import ddit_rt
from ddit_rt import FittedSchedule
from ddit_rt.families.testing import randomise
from ddit_rt.pipeline import accelerated_pipeline
from ddit_rt.pipeline.targets import KeptSchedules


@dataclass(frozen=True)
class Run:
    """One pipeline call.

    Attributes:
        specimen: Name of the pipeline.
        settings: Of ``accelerate``.
        inputs: Options of the specimen's arguments.
        more: Arguments of the call, over the specimen's.
        parallel: Of diffusers' ``ContextParallelConfig``.
        elsewhere: Settings of all ranks but the first, over ``settings``.
        heads: Of the transformer, which Ulysses divides among ranks.
        kept: A schedule that is kept for the call where the first rank looks, and nowhere else.
    """

    specimen: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    parallel: Mapping[str, Any] = field(default_factory=lambda: {"ulysses_degree": 2})
    elsewhere: Mapping[str, Any] = field(default_factory=dict)
    heads: int = 2
    kept: FittedSchedule | None = None

    def pipeline(self) -> Any:
        """The pipeline, plain."""
        pipe = SPECIMENS[self.specimen].make()
        transformer = pipe.transformer
        if transformer.config.num_attention_heads != self.heads:
            config = {**transformer.config, "num_attention_heads": self.heads}
            pipe.register_modules(transformer=randomise(type(transformer).from_config(config)))
        return pipe

    def call(self, pipe: Any) -> torch.Tensor:
        """The latents of a call."""
        return latents_of(pipe, {**SPECIMENS[self.specimen].arguments(**self.inputs), **self.more})


@dataclass(frozen=True)
class Made:
    """What a rank made of a run: latents, the multiple of every step, and what stands beside the steps."""

    latents: torch.Tensor
    schedule: list[int]
    notes: set[str]


def alone(run: Run, ranks: int = 1) -> Made:
    """The run in this process, its coarse grids padded as so many ranks need them."""

    def padded(module: Any, inputs: Any) -> Any:
        return replace(inputs, geometry=replace(inputs.geometry, ranks=ranks))

    with patch.object(accelerated_pipeline, "divided", padded):
        return _made(run, run.pipeline())


def on_ranks(world: int, runs: Mapping[str, Run], folder: Path) -> dict[str, list[Made]]:
    """Runs on so many ranks, one after the other; what each rank made, by the run's name.

    Args:
        world: Number of ranks.
        runs: By name.
        folder: For what the processes tell each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(runs), folder / "work.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = f"import ranks; ranks.fork({str(folder)!r}, {world}, {port})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [made[name] for made in ranks] for name in runs}


def _made(run: Run, pipe: Any, first: bool = True) -> Made:
    ddit_rt.accelerate(pipe, **{**run.settings, **({} if first else run.elsewhere)})
    with patch.object(KeptSchedules, "find", lambda *_: (run.kept, "the first rank") if first and run.kept else None):
        latents = run.call(pipe)
    report = ddit_rt.report(pipe)
    return Made(latents, report.schedule, {step.note for step in report.steps})


def _flash_on_cpu(
    ctx: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: float,
    causal: bool,
    scale: Any,
    gqa: bool,
    lse: bool,
    **_: Any,
) -> Any:
    """Attention and its log-sum-exp, (B, S, H, D) and (B, S, H): torch's flash attention, which has a CPU kernel."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = (x.transpose(1, 2) for x in flash(*(x.transpose(1, 2) for x in (query, key, value))))
    return (out, sums) if lse else out


def _rank(runs: Mapping[str, Run], rank: int, world: int, port: int, folder: Path) -> None:
    from diffusers import ContextParallelConfig
    from diffusers.models import attention_dispatch

    torch.accelerator.device_count = lambda: world  # diffusers counts accelerators, and a CPU is none
    attention_dispatch._native_flash_attention_forward_op = _flash_on_cpu  # diffusers' is CUDA's
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = {}
    for name, run in runs.items():
        pipe = run.pipeline()
        if run.parallel.get("ring_degree", 1) > 1:
            pipe.transformer.set_attention_backend("_native_flash")
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(**run.parallel))
        found[name] = _made(run, pipe, first=rank == 0)
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def fork(folder: str, world: int, port: int) -> None:
    """Makes the ranks, and ends the process when they have ended."""
    runs: Mapping[str, Run] = torch.load(Path(folder, "work.pt"), weights_only=False)
    children: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                _rank(runs, rank, world, port, Path(folder))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:  # the others would wait for this one
            failed = True
            for other in children:
                os.kill(other, signal.SIGTERM)
    sys.exit(failed)
