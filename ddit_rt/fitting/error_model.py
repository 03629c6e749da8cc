"""How far off a schedule will end, to first order, from measurements along plain runs: no model runs for a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..multiples import SKIP
from ..schedule import trust, way

Array = NDArray[np.float32]
_Run = tuple[float, Array, bool, float]  # σ, prediction, whether a full step, way along the run
T = TypeVar("T")


@dataclass(frozen=True)
class ErrorModel:
    """Measurements along N plain runs of S steps, every prediction reduced to D numbers that keep distances.

    Attributes:
        sigmas: (S + 1,) noise levels.
        full: (S, N, D) the model's predictions at full steps.
        coarse: Multiple -> (S, N, D), what it says of the low band on coarse tokens.
        shares: Multiple -> what a coarse step costs of a full one, in FLOP or seconds; a skipped one, 0, costs nothing
            unless it is in it.
        sensitivity: (S,) by how much the rest of the run multiplies an error made at a step.
        transformers: (S,) which transformer makes a step.
        floor: (N,) mean square below which an error does not count.
        adapter_residual: Multiple -> (S, G), with an adapter: the share of a straight line's error that it leaves at a
            step, 1 to G steps after the last full one; farther, it leaves all of it. ``coarse`` does not count then.
        probes: Whether a coarse step needs coarse runs at its anchors, as delta does and an adapter does not.
        corrector: Whether gaps are corrected, as by :class:`ddit_rt.schedule.FlowSolver`.
        looks_aside: Count that at a gap's end the model looks at a latent which is not yet corrected.
    """

    sigmas: Array
    full: Array
    coarse: Mapping[int, Array]
    shares: Mapping[int, float]
    sensitivity: Array
    transformers: tuple[int, ...]
    floor: Array
    adapter_residual: Mapping[int, Array] = field(default_factory=dict)
    probes: bool = True
    corrector: bool = True
    looks_aside: bool = True

    @property
    def steps(self) -> int:
        return len(self.full)

    @property
    def takeovers(self) -> tuple[int, ...]:
        """Steps that another transformer makes than the one before."""
        return tuple(t for t in range(1, self.steps) if self._changes(t))

    def _changes(self, t: int) -> bool:
        return t > 0 and self.transformers[t] != self.transformers[t - 1]

    def must_be_full(self, index: int) -> bool:
        """The first two steps of every transformer, from which lines begin."""
        return any(i < 0 or self.transformers[i] != self.transformers[index] for i in (index - 1, index - 2))

    def cost(self, schedule: Sequence[int]) -> float:
        """FLOP or seconds of a schedule in full steps, probes included."""
        total, anchors = 0.0, [0, 0]
        probed: set[tuple[int, int]] = set()
        for t, multiple in enumerate(schedule):
            if multiple == 1:
                total += 1
                anchors = [anchors[1], t]
            elif multiple != SKIP:
                needed = {(anchor, multiple) for anchor in anchors} - probed if self.probes else set()
                total += self.shares[multiple] * (1 + len(needed))
                probed |= needed
            else:
                total += self.shares.get(SKIP, 0.0)
        return total

    def error(self, schedule: Sequence[int]) -> Array:
        """Mean square of the final latent's error, (N,).

        Errors of the steps add up as vectors, each times its step in σ and its sensitivity: those of neighbouring steps
        meet the same rest of the run and may cancel. A skipped step lies where the solver forecasts it, until the full
        step after it lets :class:`ddit_rt.schedule.FlowSolver` correct the gap; a coarse one on the line through the
        last two full ones, plus what the coarse model says beyond its own line, or less what an adapter
        makes good.
        """
        steps = np.diff(self.sigmas)
        weights = (steps * self.sensitivity).astype(np.float32)
        total = np.zeros_like(self.full[0])
        full_steps: list[int] = []
        runs: list[_Run] = []
        gap: list[int] = []
        for t, multiple in enumerate(schedule):
            sigma, truth = float(self.sigmas[t]), self.full[t]
            changes = self._changes(t)
            if multiple == SKIP and not changes:
                gap.append(t)
                continue
            if gap and multiple == 1 and self.corrector and not changes:
                total += self._corrected(runs, gap, t, steps, weights)
            elif gap:
                total += self._forecast(runs, gap, weights)
            gap = []
            if changes:
                full_steps, runs = [], []
            if multiple == 1:
                full_steps = _with_newest(full_steps, t, bool(full_steps) and self.sigmas[full_steps[-1]] == sigma)
                guess = truth
            else:
                predict = self._with_adapter if self.adapter_residual else self._with_delta
                guess = predict(t, multiple, full_steps)
                total += weights[t] * (guess - truth)
            runs = _with_newest(runs, (sigma, guess, multiple == 1, self._way(t)), bool(runs) and runs[-1][0] == sigma)
        if gap:
            total += self._forecast(runs, gap, weights)
        return np.square(total).mean(-1)

    def _forecast(self, runs: Sequence[_Run], gap: Sequence[int], weights: Array) -> Array:
        """What skipped steps add where nothing corrects them."""
        return sum(weights[t] * (self._expected(runs, t) - self.full[t]) for t in gap)

    def _expected(self, runs: Sequence[_Run], t: int) -> Array:
        """The forecast for a step, as the solver makes it, or where there is none the line that paths follow."""
        sigma = float(self.sigmas[t])
        if not self.corrector:
            return _line([run[:2] for run in runs], sigma)
        newest, last = runs[-1][:2]
        if len(runs) < 2:
            return last
        older, before, _, from_way = runs[0]
        share = trust(self._way(t) - from_way) * (sigma - newest) / (newest - older)
        return last + np.float32(share) * (last - before)

    def _way(self, t: int) -> float:
        return way(t / self.steps)

    def _corrected(self, runs: Sequence[_Run], gap: Sequence[int], end: int, steps: Array, weights: Array) -> Array:
        """What a gap adds that is corrected at step ``end``.

        Two parts: where the parabola through its ends misses the truth, and where the model looked, at ``end``, at a
        latent that was still off. How much the second changes the prediction follows from how the sensitivity falls.
        """
        begin, first, begin_full, _ = runs[-1]
        sigma, truth = float(self.sigmas[end]), self.full[end]
        slope = (truth - first) / (sigma - begin)
        bend = None
        if len(runs) > 1 and begin_full and runs[0][2]:
            older, before, _, from_way = runs[0]
            bend = trust(self._way(end) - from_way) * (slope - (first - before) / (begin - older)) / (sigma - older)
        missed = np.zeros_like(truth)
        total = np.zeros_like(truth)
        for t in gap:
            here = float(self.sigmas[t])
            guess = first + (here - begin) * slope
            if bend is not None:
                guess += (here - begin) * (here - sigma) * bend
            total += weights[t] * (guess - self.full[t])
            missed += np.float32(steps[t]) * (self._expected(runs, t) - self.full[t])
        if not self.looks_aside:
            return total
        return total + np.float32(self.sensitivity[end] * self._response[end] * (begin - sigma)) * missed

    @cached_property
    def _response(self) -> Array:
        """(S,) -∂v/∂z along the run, as d ln(sensitivity) / dσ has it; never below 0."""
        logs = np.log(np.maximum(self.sensitivity, 1e-3))
        sigmas = self.sigmas[:-1]
        different = np.concatenate([[True], np.diff(sigmas) != 0])
        found = np.interp(-sigmas, -sigmas[different], np.gradient(logs[different], sigmas[different]))
        return np.maximum(found, 0.0)

    def _with_delta(self, t: int, multiple: int, full_steps: Sequence[int]) -> Array:
        known = self.coarse[multiple]
        points = [(float(self.sigmas[i]), self.full[i] - known[i]) for i in full_steps]
        return known[t] + _line(points, float(self.sigmas[t]))

    def _with_adapter(self, t: int, multiple: int, full_steps: Sequence[int]) -> Array:
        residual, distance = self.adapter_residual[multiple], t - full_steps[-1]
        points = [(float(self.sigmas[i]), self.full[i]) for i in full_steps]
        share = residual[t, distance - 1] if distance <= residual.shape[1] else np.float32(1.0)
        return self.full[t] + share * (_line(points, float(self.sigmas[t])) - self.full[t])

    def loss(self, schedule: Sequence[int]) -> float:
        """Mean over the runs of the logarithm of :meth:`error`; with errors below the floor counted as the floor."""
        return float(np.log(self.error(schedule) + self.floor).mean())


def _line(points: Sequence[tuple[float, Array]], sigma: float) -> Array:
    """:func:`ddit_rt.granularity.line` on arrays, which the search calls some ten thousand times."""
    older, newest = points[0], points[-1]
    if len(points) < 2:
        return newest[1]
    share = min((sigma - newest[0]) / (newest[0] - older[0]), 1.0)
    return newest[1] + share * (newest[1] - older[1])


def _with_newest(items: list[T], item: T, replaces: bool) -> list[T]:
    """The last two, the newest replaced where it lies at the same noise level."""
    return [*(items[:-1] if replaces else items)[-1:], item]
