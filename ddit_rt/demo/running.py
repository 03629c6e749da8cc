"""What the demos of pictures and of videos share: runs with a progress bar, targets in turns, and the page."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from tqdm import tqdm

from ..errors import ConfigError
from ..trajectories import Outcome, generate, generate_converged


@dataclass
class Runner:
    """Runs the pipeline and moves the progress bar.

    Attributes:
        pipe: The pipeline; left plain.
        bar: Moved by one per run.
        call: Arguments of the pipeline that all runs share.
        seed: Of the noise.
    """

    pipe: Any
    bar: tqdm
    call: dict[str, Any]
    seed: int

    def __call__(self, what: str, prompt: str, settings: Mapping[str, Any] | None, **call: Any) -> Outcome:
        self.bar.set_description(f"{what:<45}")
        outcome = generate(self.pipe, settings, self.seed, **{**self.call, **call, "prompt": prompt})
        self.bar.update()
        return outcome

    def converged(self, what: str, prompt: str) -> Outcome:
        """The converged picture."""
        self.bar.set_description(f"{what:<45}")
        outcome = generate_converged(self.pipe, self.seed, **{**self.call, "prompt": prompt})
        self.bar.update()
        return outcome

    def in_turns(
        self, name: str, prompt: str, rows: Mapping[str, Mapping[str, Any]], repeats: int
    ) -> dict[str, list[Outcome]]:
        """The plain pipeline, as row "plain", and every row of settings, one after the other, ``repeats`` times."""
        outcomes: dict[str, list[Outcome]] = {}
        for _ in range(repeats):
            for row, settings in {"plain": None, **rows}.items():
                outcomes.setdefault(row, []).append(self(f"{name}: {row}", prompt, settings))
        return outcomes


@contextmanager
def started(pipe: Any, runs: int, call: dict[str, Any], seed: int) -> Iterator[Runner]:
    """A :class:`Runner` for so many runs, after a short one that warms up."""
    with tqdm(total=runs, bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]") as bar:
        generate(pipe, None, seed, **{**call, "num_inference_steps": 2, "prompt": "warm-up"})
        yield Runner(pipe, bar, call, seed)


def check_numbers(steps: int, repeats: int, least_steps: int, why: str) -> None:
    """Refuses what a demo cannot show.

    Raises:
        ConfigError: too few steps, with the reason ``why``, or repeats.
    """
    if steps < least_steps:
        raise ConfigError(f"steps={steps}: the demo needs at least {least_steps}, {why}.")
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: at least one timed run.")


def timed(made: Sequence[Outcome], plain: Sequence[Outcome]) -> dict[str, Any]:
    """Speed of a row's outcomes beside the plain ones of the same turns, and its schedule."""
    seconds, report = [outcome.seconds for outcome in made], made[0].report
    return {
        "seconds": seconds,
        "speedup_wall_clock": statistics.median(o.seconds for o in plain) / statistics.median(seconds),
        "speedup_flop": 1.0 if report is None else report.speedup_estimate,
        "schedule": [] if report is None else report.schedule,
        "fitted": report is not None and report.kept is not None,
    }


def write_page(pipe: Any, output: Path, template: str, steps: int, seed: int, **measured: Any) -> dict[str, Any]:
    """Writes ``demo.json`` and ``index.html`` into ``output``.

    Returns:
        All that was measured, with machine and versions; ``page`` is the path of the page.
    """
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "device": str(pipe.device),
        "steps": steps,
        "seed": seed,
        **measured,
    }
    (output / "demo.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    page = Environment(loader=PackageLoader("ddit_rt.demo", "."), autoescape=True).get_template(template)
    (output / "index.html").write_text(page.render(result=result), encoding="utf-8")
    result["page"] = str(output / "index.html")
    return result
