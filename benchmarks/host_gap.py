"""What the host does between a decision and the replay that follows it, while a GPU would wait; measured on any CPU.

    python benchmarks/host_gap.py [--steps 60]

The transformers have FLUX.1-dev's and Wan 2.1 1.3B's modules at tiny widths, and graphs that replay nothing: what is
left is Python. On a GPU the gap between two model runs holds this, the decision kernel and a wake-up of the host.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from pipe_models import MODELS, build

import ddit_rt
from ddit_rt.pipeline import accelerated_pipeline
from ddit_rt.runtime import Captured, GraphRunner
from ddit_rt.schedule import PendingEvolution

_DECISION, _REFRESH = PendingEvolution.decision, GraphRunner.refresh


class Stamps:
    """A capture back-end whose replays do nothing but tell the time."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.decided: float | None = None
        self.gaps: list[float] = []

    def capture(self, function: Callable[[], Any], device: torch.device) -> Captured:
        return Captured(self.replay, function())

    def follow(self, device: torch.device) -> None:
        pass

    def release(self, captured: Captured) -> None:
        pass

    def decide(self, pending: PendingEvolution) -> int:
        """The decision; the clock runs from the moment when the host has it."""
        multiple = _DECISION(pending)
        self.decided = time.perf_counter()
        return multiple

    def replay(self) -> None:
        if self.decided is not None:
            self.gaps.append(time.perf_counter() - self.decided)
        self.decided = None


def gaps(model: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds from every decision to its replay, and of every look for changes, which happens while the host waits."""
    pipe, inputs = build(model, torch.device("cpu"), tiny=True, deep=True)
    stamps, looks = Stamps(), []

    def refresh(runner: GraphRunner, *modules: torch.nn.Module) -> None:
        began = time.perf_counter()
        _REFRESH(runner, *modules)
        looks.append(time.perf_counter() - began)

    with (
        patch.object(accelerated_pipeline, "make_runner", lambda *_: GraphRunner(stamps, 16)),
        patch.object(PendingEvolution, "decision", lambda pending: stamps.decide(pending)),
        patch.object(GraphRunner, "refresh", refresh),
        ddit_rt.accelerated(pipe, threshold=1e-30),  # below which nothing lies: every step decides, and stays full
        torch.no_grad(),
    ):
        for _ in range(2):
            stamps.gaps.clear()
            looks.clear()
            pipe(**inputs, num_inference_steps=steps)
    return stamps.gaps, looks


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for model, known in MODELS.items():
        found = [[1e6 * value for value in values] for values in gaps(model, options.steps)]
        texts = [f"{statistics.median(v):.0f} us (least {min(v):.0f}, most {max(v):.0f})" for v in found]
        print(f"{known.title.split(',')[0]}: decision to replay {texts[0]}; look for changes {texts[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
