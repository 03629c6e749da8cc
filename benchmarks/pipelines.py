"""Measures whole pipelines at their real sizes, with random weights: latency does not depend on them. ``gpu_suite.py``
runs this.

Times are those of the denoising loop; text encoders and decoder, which a whole request has too, are rows of their own
(``ends``). Coarse steps are untrained (delta) unless the provider has an adapter.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pipe_ends
import pipe_models
import pipe_providers
import torch
from pipe_providers import PROVIDERS
from pipe_schedules import Plan, plans
from pipe_timeline import Timeline, watched
from store import Store

import ddit_rt

KEYS = ("provider", "schedule", "steps")
ROW_SECONDS = 30  # no further run of a row that has taken this long, or would
SETTLED = 4  # steps without a decision, while its history fills


def summary(seconds: Sequence[float], unit: float = 1.0) -> dict[str, float]:
    """Median and range, in ``1 / unit`` seconds."""
    values = [second * unit for second in seconds]
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "count": len(values)}


def by_size(schedules: Sequence[Sequence[int]], seconds: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Milliseconds per size, apart for steps that repeat the size before them and steps that switch to another.

    Args:
        schedules: The sizes of every run.
        seconds: Of all steps but the first of every run: it has no predecessor.
    """
    kinds: dict[str, dict[int, list[float]]] = {"repeating": {}, "switching": {}}
    for schedule, run in zip(schedules, seconds):
        for before, multiple, second in zip(schedule, schedule[1:], run, strict=False):
            kind = kinds["repeating" if before == multiple else "switching"]
            kind.setdefault(multiple, []).append(second)
    return {
        kind: {str(k): summary(values, 1e3) for k, values in sorted(found.items())} for kind, found in kinds.items()
    }


class _Memory:
    """What a CUDA device has reserved, in GiB; nothing on a CPU."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def settle(self) -> None:
        """Gives back what nobody uses, and measures the peak from here on."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        return torch.cuda.max_memory_reserved() / 2**30 if self._cuda else None

    def graphs(self) -> float | None:
        """Of graphs' own pools, static inputs not counted."""
        if not self._cuda:
            return None
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)) / 2**30


def _timed(call: Callable[[], Any], cuda: bool) -> float:
    """Wall-clock seconds of one call, to the end of its device work."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(
    pipe: Any, inputs: dict[str, Any], provider: str, plan: Plan, timeline: Timeline, runs: int, device: torch.device
) -> dict[str, Any]:
    """The row of one provider and schedule, without what identifies it."""
    cuda = device.type == "cuda"
    ours = provider.startswith("ours")
    current: list[int] = []
    if ours:
        ddit_rt.accelerate(pipe, **{**plan.settings(current), **pipe_providers.settings(provider, pipe, cuda)})
    memory = _Memory(cuda)
    memory.settle()

    def call(multiples: Sequence[int]) -> None:
        current[:] = multiples
        generator = torch.Generator(device).manual_seed(0)
        pipe(
            **inputs, num_inference_steps=len(multiples), generator=generator, callback_on_step_end=timeline.on_step_end
        )

    first = _timed(lambda: call(plan.short()), cuda)
    row: dict[str, Any] = {"warm_up_s": first, "warm_up_peak_gib": memory.peak()}
    memory.settle()
    walls: list[float] = []
    schedules, steps, models, gaps = [], [], [], []
    report = None
    while len(walls) < runs and (not walls or sum(walls) + walls[-1] < ROW_SECONDS):
        with timeline.recording():
            walls.append(_timed(lambda: call(plan.multiples or (1,) * plan.steps), cuda))
        report = ddit_rt.report(pipe) if ours else None
        schedules.append([1] * plan.steps if report is None else report.schedule)
        steps.append(timeline.steps())
        models.append(timeline.model_runs())
        gaps += timeline.gaps()[SETTLED:]
    row.update(
        wall_s=summary(walls),
        step_ms=by_size(schedules, steps),
        model_ms=by_size(schedules, models),
        # schedules of skipped steps may have no two model runs in neighbouring steps
        gap_us=summary(gaps, 1e6) if gaps else None,
        multiples=schedules[0],
        coarse=None if report is None else report.config["coarse"],
        peak_gib=memory.peak(),
        graph_pool_gib=memory.graphs(),
    )
    if report is not None:
        row["flop_speedup"] = report.speedup_estimate
        row["executed"] = sorted({step.executed for step in report.steps})
        row["notes"] = sorted({step.note for step in report.steps if step.note})
    return row


def _rows_of(
    model: str, provider: str, store: Store, device: torch.device, tiny: bool, runs: int, left: Callable[[], float]
) -> None:
    """Measures what the store lacks of one provider, while time is left."""
    known = pipe_models.MODELS[model]
    steps, more_steps = (8, known.more_steps and 10) if tiny else (known.steps, known.more_steps)
    flops = store.content["flops"]["per_model_run"]
    wanted = [
        plan
        for plan in plans(provider, steps, more_steps, {int(k): value for k, value in flops.items()})
        if not store.has(provider=provider, schedule=plan.name, steps=plan.steps)
    ]
    # a provider that cannot be had here is skipped; one that fails where it should not is an error
    obstacle, failure = pipe_providers.obstacle(model, provider, device), ""
    timeline = Timeline(device)
    pipe: Any = None
    inputs: dict[str, Any] = {}
    with watched(known.transformer, timeline):
        for plan in wanted:
            row: dict[str, Any] = {"provider": provider, "schedule": plan.name, "steps": plan.steps}
            if not (obstacle or failure) and left() <= 0:
                print(f"out of time before {model} {provider} {plan.name}", flush=True)
                return
            if obstacle:
                row["skipped"] = obstacle
            elif failure:
                row["error"] = failure
            else:
                try:
                    if pipe is None:
                        pipe, inputs = pipe_providers.prepared(model, provider, device, tiny)
                    row.update(measure(pipe, inputs, provider, plan, timeline, runs, device))
                except Exception as error:  # the others' numbers must not be lost with it
                    row["error"] = f"{type(error).__name__}: {error}"[:500]
                    failure = "" if pipe is not None else row["error"]
            if pipe is not None:
                ddit_rt.restore(pipe)
            store.put(row)
            _tell(model, row)


def _ends_of(model: str, store: Store, device: torch.device, tiny: bool, runs: int, left: Callable[[], float]) -> None:
    """Measures what stands before and behind the denoising loop, as far as the store lacks it."""
    for name in pipe_ends.ENDS:
        row: dict[str, Any] = {"provider": "ends", "schedule": name, "steps": 0}
        if store.has(**row):
            continue
        if left() <= 0:
            print(f"out of time before {model} {name}", flush=True)
            return
        try:
            call = pipe_ends.make(model, name, device, tiny)
            _timed(call, not tiny)
            row["wall_s"] = summary([_timed(call, not tiny) for _ in range(runs)])
        except Exception as error:  # the others' numbers must not be lost with it
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        call = None
        _Memory(not tiny).settle()
        store.put(row)
        _tell(model, row)


def _tell(model: str, row: dict[str, Any]) -> None:
    skipped = f"skipped: {row['skipped']}" if "skipped" in row else ""
    told = row.get("error") or skipped or f"{row['wall_s']['median']:.3f} s"
    print(f"{model:5} {row['provider']:30} {row['schedule']:13} {row['steps']:3} steps  {told}", flush=True)


def run(
    model: str,
    store: Store,
    device: torch.device,
    runs: int,
    left: Callable[[], float],
    providers: Sequence[str] = PROVIDERS,
) -> None:
    """Measures one model, row by row.

    Args:
        model: Key of :data:`pipe_models.MODELS`.
        store: Takes the rows; those it has are left out.
        device: A CPU makes it a dry run at tiny sizes.
        runs: Most measured calls per row.
        left: Seconds left; no row is begun without any.
        providers: Some of :data:`pipe_providers.PROVIDERS`.
    """
    tiny = device.type == "cpu"
    # the configuration alone tells the costs, so that a provider that is done need not be built
    pipe, inputs = pipe_models.build(model, torch.device("cpu" if tiny else "meta"), tiny)
    store.note("flops", {"per_model_run": pipe_models.flops(pipe, inputs)})
    del pipe
    store.note("what", {"title": pipe_models.MODELS[model].title, "weights": "random"})
    for provider in providers:
        if provider == "ends":
            _ends_of(model, store, device, tiny, runs, left)
            continue
        _rows_of(model, provider, store, device, tiny, runs, left)
        # what a provider compiled and captured goes with its pipeline
        torch.compiler.reset()
        _Memory(not tiny).settle()
