"""Fits schedules to a model: measures its steps along plain runs, searches, and runs what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import FREE, SUPPORTED_MULTIPLES
from ..errors import ConfigError
from ..evaluate.metrics import psnr
from ..evaluate.outcome import generate
from ..granularity import Adapter, Trajectory, load_adapter
from ..preconditions import check_speedup
from .outlook import Array, Outlook
from .search import search
from .traces import Errors, Trace, Tracer

SENSITIVITY_AT = (0.04, 0.1, 0.16, 0.24, 0.34, 0.48, 0.64, 0.84, 0.98)
"""Shares of a run at which its sensitivity is measured; it falls by orders of magnitude, most of them early."""

LEARNED_EVERY = (2, 3, 5)
"""Distances from fine step to fine step at which an adapter's errors are measured."""

_NUMBERS = 512
_FLOOR = 1e-3

Progress = Callable[[str], None]


@dataclass(frozen=True)
class FittedSchedule:
    """A schedule and what it gave.

    Attributes:
        schedule: One multiple per denoising step, 0 for no model call; for ``accelerate(pipe, schedule=...)``.
        speedup: Ratio of FLOP in real runs.
        psnr: Mean, in dB, of real runs to the plain ones, on the prompts of the fit.
        prompts: How many.
        sensitivity: One number per step, by how much the rest of the run multiplies an error made there; empty if the
            schedule was not fitted.
    """

    schedule: list[int]
    speedup: float
    psnr: float
    prompts: int
    sensitivity: list[float] = field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Writes the fields as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> FittedSchedule:
        """Reads what :meth:`save` wrote.

        Raises:
            ConfigError: there is no such file, or something else is in it.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"schedule={str(path)!r}: there is no such file.") from None
        except (TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"schedule={str(path)!r} is not what `ddit-rt fit` writes: {error}.") from None


def fit_schedule(
    pipe: Any,
    prompts: Sequence[str],
    speedup: float = 2.0,
    kinds: Sequence[int] = (1, 2, 4, FREE),
    seed: int = 0,
    progress: Progress = lambda text: None,
    adapter: str | Path | Adapter | None = None,
    **call: Any,
) -> FittedSchedule:
    """Finds the schedule that stays nearest to the plain pipeline at a wanted ratio of FLOP.

    The best, in real runs, of the one that may use every kind and the one without coarse steps; with an adapter also
    of the one that would be found if its coarse steps erred as delta's do.

    Args:
        pipe: A supported pipeline; left plain.
        prompts: A few that resemble your use; four do. Each costs about eight plain runs, once.
        speedup: Wanted ratio of FLOP, > 1.
        kinds: Multiples that steps may run at, 0 for no model call.
        seed: Of the first prompt's noise; the i-th prompt takes seed + i.
        progress: Called with a line of text before every run.
        adapter: What coarse steps run, as for :func:`ddit_rt.accelerate`; None fits untrained ones.
        **call: Arguments of the pipeline; the schedule holds for this ``num_inference_steps`` alone, and for about
            this size and guidance.

    Raises:
        ConfigError: a kind is unknown, there is no prompt, or there are too few steps.
        OutOfReachError: no schedule of these kinds is that fast.
        UnsupportedPipelineError: the pipeline, or this way to call it, cannot run coarsely.
        AdapterMismatchError: the adapter was made for another model, or lacks one of the kinds.
    """
    check_speedup(speedup)
    _check_kinds(kinds)
    multiples = [kind for kind in kinds if kind > 1]
    settings: dict[str, Any] = {}
    if adapter is not None:
        adapter = load_adapter(adapter)
        settings = {"coarse": "adapter", "adapter": adapter, "multiples": (1, *multiples)}
    outlook = measure(pipe, prompts, multiples, seed, progress, adapter, **call)
    progress("searching")
    schedules = [search(outlook, speedup, kinds)]
    # first order flatters coarse steps where steps are long, and an adapter where its errors add up: real runs choose
    if outlook.left:
        schedules.append(search(replace(outlook, left={}), speedup, kinds))
    if FREE in kinds:
        schedules.append(search(outlook, speedup, (1, FREE)))
    different = [s for i, s in enumerate(schedules) if s not in schedules[:i]]
    runs = (tried(pipe, s, prompts, seed, progress, settings, **call) for s in different)
    found = max(runs, key=lambda found: found.psnr)
    return replace(found, sensitivity=[float(f"{gain:.3g}") for gain in outlook.sensitivity])


def measure(
    pipe: Any,
    prompts: Sequence[str],
    multiples: Sequence[int] = (2, 4),
    seed: int = 0,
    progress: Progress = lambda text: None,
    adapter: Adapter | None = None,
    **call: Any,
) -> Outlook:
    """Measures what :func:`~ddit_rt.fitting.search.search` needs; one measurement serves any number of searches.

    Args:
        pipe, prompts, seed, progress, call: As for :func:`fit_schedule`.
        multiples: Of the coarse steps.
        adapter: What they run; None for delta, which is measured in any case.
    """
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    _check_kinds(multiples)
    tracer = Tracer(pipe, call)
    sketch: _Sketch | None = None
    fine: list[torch.Tensor] = []
    floor: list[float] = []
    coarse: dict[int, list[torch.Tensor]] = {k: [] for k in multiples}
    shares: dict[int, float] = {}
    left: dict[int, list[Errors]] = {k: [] for k in multiples if adapter is not None}
    gains: list[list[float]] = []
    for i, prompt in enumerate(prompts):
        progress(f"plain run: {prompt}")
        trace = tracer.plain(prompt, seed + i)
        predictions = [tracer.canonical(trace, output) for output in trace.outputs]
        sketch = sketch or _Sketch(predictions[0].numel())
        fine.append(torch.stack([sketch(p) for p in predictions]))
        floor.append(_FLOOR**2 * float(trace.latents[-1].float().square().mean()))
        for k in multiples:
            progress(f"{k}p along it: {prompt}")
            found, shares[k] = tracer.coarse(trace, k, sketch)
            coarse[k].append(torch.stack(found))
            if adapter is None:
                continue
            for every in LEARNED_EVERY:
                errors, shares[k] = tracer.learned(trace, adapter, k, every)
                left[k].append(errors)
        progress(f"sensitivity: {prompt}")
        at = _places(trace.steps)
        gains.append([_gain(tracer, trace, t) for t in at])
    # errors grow by factors, so it is factors that are averaged, and drawn between the places where they were measured
    logs = np.log(np.maximum(np.array(gains), 1e-3)).mean(0)
    return Outlook(
        sigmas=trace.sigmas.numpy(),
        fine=torch.stack(fine, 1).numpy(),
        coarse={k: torch.stack(found, 1).numpy() for k, found in coarse.items()},
        shares=shares,
        sensitivity=np.exp(np.interp(np.arange(trace.steps), at, logs)),
        transformers=tuple(trace.transformers),
        floor=np.array(floor),
        left={k: _left(found, trace.steps) for k, found in left.items()},
        probes=adapter is None,
    )


def tried(
    pipe: Any,
    schedule: Sequence[int],
    prompts: Sequence[str],
    seed: int = 0,
    progress: Progress = lambda text: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **call: Any,
) -> FittedSchedule:
    """Runs a schedule, with further ``settings``, and the plain pipeline on ``prompts``."""
    speedups, decibels = [], []
    for i, prompt in enumerate(prompts):
        progress(f"trying: {prompt}")
        plain = generate(pipe, None, seed + i, **{**call, "prompt": prompt})
        fast = generate(pipe, {"schedule": list(schedule), **settings}, seed + i, **{**call, "prompt": prompt})
        assert fast.report is not None
        speedups.append(fast.report.speedup_estimate)
        decibels.append(psnr(fast.frames, plain.frames))
    return FittedSchedule(list(schedule), float(np.mean(speedups)), float(np.mean(decibels)), len(prompts))


def _check_kinds(kinds: Sequence[int]) -> None:
    for kind in kinds:
        if kind != FREE and kind not in SUPPORTED_MULTIPLES:
            raise ConfigError(f"kinds={list(kinds)}: {kind} is none of {SUPPORTED_MULTIPLES}, nor {FREE}.")


def _places(steps: int) -> list[int]:
    if steps < 4:
        raise ConfigError(f"num_inference_steps={steps}: too few to choose from; 4 at least.")
    return sorted({min(max(round(share * steps), 2), steps - 1) for share in SENSITIVITY_AT})


def _gain(tracer: Tracer, trace: Trace, t: int) -> float:
    """By how much the run multiplies the error that a free step at ``t`` makes."""
    before = Trajectory()
    for i in range(t):
        before.add_run(float(trace.sigmas[i]), trace.outputs[i])
    error = before.forecast(float(trace.sigmas[t])) - trace.outputs[t]
    made = abs(float(trace.sigmas[t + 1] - trace.sigmas[t])) * float(error.square().mean().sqrt())
    if made == 0:
        return 1.0
    return float((tracer.disturbed(trace, t, error) - trace.latents[-1].float()).square().mean().sqrt()) / made


def _left(found: Sequence[Errors], steps: int) -> Array:
    """(S, G): what the adapter leaves of a line's error; drawn between the steps where it was measured."""
    reach = max(distance for errors in found for _, distance in errors)
    table = np.ones((steps, reach), np.float32)
    for distance in range(1, reach + 1):
        sums: dict[int, NDArray[np.float64]] = {}
        for errors in found:
            for (step, since), pair in errors.items():
                if since == distance:
                    sums[step] = sums.get(step, np.zeros(2)) + pair
        at = sorted(sums)
        shares = [float(np.sqrt(sums[step][0] / max(sums[step][1], 1e-30))) for step in at]
        table[:, distance - 1] = np.interp(np.arange(steps), at, shares)
    return table


class _Sketch:
    """Sums of randomly signed entries: few numbers whose mean square is, on average, that of all entries."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._count = min(_NUMBERS, size)
        self._bucket = torch.randint(self._count, (size,), generator=generator)
        self._sign = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0
        self._scale = (self._count / size) ** 0.5

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.flatten().float().cpu() * self._sign
        return torch.zeros(self._count).index_add(0, self._bucket, flat) * self._scale
