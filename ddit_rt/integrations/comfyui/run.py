"""One sampling run of ComfyUI: which step it is at, what that step runs at, and what later ones need of it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...config import DDiTConfig
from ...errors import ConfigError, ScheduleError
from ...granularity import CoarsePath, Models, PathOptions, PredictionHistory, Scalar, default_path, make_path
from ...multiples import SKIP
from ...schedule import (
    LatentEvolution,
    Policy,
    Ran,
    Report,
    Spacing,
    StepRecord,
    StepView,
    ThresholdPolicy,
    make_policy,
)
from .calls import DiffusionCall, canonical, centred, patch_of, restored
from .cost import Cost
from .histories import add_full, add_run, joined, keep_residuals
from .samplers import EulerSteps, SamplerFacts

_NEAR = 1e-5  # samplers hand on a noise level in the latent's dtype


@dataclass
class _Step:
    """The step that a sampler is at.

    Attributes:
        index: From 0; None between the noise levels that were asked for.
        multiple: As chosen.
        record: Of the step.
        ran: What each model call of it came from.
        keys: Of the conditionings that it has run so far.
    """

    index: int | None
    sigma: float
    multiple: int
    record: StepRecord
    ran: list[Ran] = field(default_factory=list)
    keys: list[tuple[Hashable, ...]] = field(default_factory=list)


class SamplingRun:
    """The state of one sampling run; it begins and ends with it.

    Args:
        config: Settings.
        sampler: Facts of it.
        levels: Noise levels of the steps and the one after them, as the run will have them; see :func:`place`.
        model: The diffusion model.
        policy: Made for ``config``.
        obstacle: Why every step has to be full; empty if none has to.

    Raises:
        ScheduleError: the policy cannot serve a run of so many steps.
        ConfigError: the threshold rule has no patch size to go by.
    """

    def __init__(
        self,
        config: DDiTConfig,
        sampler: SamplerFacts,
        levels: Sequence[float],
        model: torch.nn.Module,
        policy: Policy,
        obstacle: str = "",
    ) -> None:
        self.steps = len(levels) - 1
        policy.start(self.steps)
        self._config, self._policy, self._levels, self._model = config, policy, list(levels), model
        self._path = path_of(config)
        self._native = config.positions != "interpolated"
        self._obstacle = f"{sampler.name} adds noise in its steps" if sampler.adds_noise else obstacle
        self._histories: dict[Hashable, PredictionHistory] = {}
        self._spacing = Spacing()
        self._records: dict[int, StepRecord] = {}
        self._now: _Step | None = None
        self._last: tuple[Hashable, ...] = ()
        self._cost = Cost.of(model)
        self._began = 0.0
        self._remark = ""
        self._euler: EulerSteps | None = None
        approximates = config.approximates and not self._obstacle
        if approximates and sampler.is_euler and config.corrector:
            self._euler = EulerSteps(self._levels, config.aim)
        elif approximates and not sampler.is_euler:
            self._remark = f"{sampler.name}: skipped steps follow a line, uncorrected"
        self._evolution: LatentEvolution | None = None
        self._before: torch.Tensor | None = None
        if isinstance(policy, ThresholdPolicy) and approximates:
            if patch_of(model) is None:
                raise ConfigError(
                    f"threshold={config.threshold:g}: {type(model).__name__} tells no patch size, which the threshold "
                    "rule goes by; give a speed-up or a schedule."
                )
            self._evolution = LatentEvolution(
                config.order, config.multiples, config.quantile, config.backend, config.threshold
            )

    # -- a step ---------------------------------------------------------------------------------------------------

    def predict_noise(self, executor: Any, latent: torch.Tensor, timestep: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Around everything that a sampler calls the model: one step's decision, and what it leads to.

        Args:
            executor: Runs what is wrapped.
            latent: (B, C, H, W) or (B, C, F, H, W), float32.
            timestep: Noise level, (B,).
            rest: More arguments, passed on.

        Returns:
            The clean latent, of the shape of ``latent``.
        """
        step = self._begin(latent, float(timestep.flatten()[0]))
        try:
            clean = executor(latent, timestep, *rest)
        finally:
            self._now = None
        ran = _together(step.ran)
        if step.index is None:
            return clean
        self._last = tuple(step.keys)
        if self._euler is not None:
            source = (frozenset(step.keys), latent.shape)
            clean = self._euler.clean(step.index, ran, source, latent, clean)
            step.record.miss = self._euler.missed
        if not step.ran:
            step.record.note = "the model calls no DIFFUSION_MODEL wrappers, and ran plain"
        # what the step did in fact; several calls in a step, as guidance makes, may differ
        step.record.multiple = {Ran.FULL: 1, Ran.SKIPPED: SKIP}.get(ran, step.multiple)
        return clean

    def _begin(self, latent: torch.Tensor, sigma: float) -> _Step:
        index = self._index_of(sigma)
        known = None if index is None else self._records.get(index)
        if known is not None:  # Heun's method, for one, comes twice to a noise level
            step = _Step(index, self._levels[index or 0], known.multiple, known)
        elif index is None:
            # what it costs counts for the step before it
            record = self._newest if self._records else StepRecord(0, sigma * 1000, sigma, 1, 0)
            record.note = record.note or "the sampler also asked between noise levels, and got a full run"
            step = _Step(None, sigma, 1, record)
        else:
            if self._records:
                self._spacing.add(self._newest.multiple)
            self._clock()
            self._watch(latent)
            note = self._obstacle
            multiple = 1 if note else self._choose(index)
            record = StepRecord(
                index, sigma * 1000, sigma, multiple, 0, note=note or (self._remark if multiple == SKIP else "")
            )
            if self._evolution is not None and self._evolution.current is not None:
                record.patch_std = self._evolution.current.wait
            self._records[index] = record
            step = _Step(index, self._levels[index], multiple, record)
        self._now = step
        return step

    @property
    def _newest(self) -> StepRecord:
        return self._records[max(self._records)]

    def _clock(self) -> None:
        """Ends the newest step's time, and begins the next one's: reading a noise level has waited for the device."""
        now = time.perf_counter()
        if self._records:
            self._newest.elapsed = partial(float, now - self._began)
        self._began = now

    def _index_of(self, sigma: float) -> int | None:
        """The step at a noise level: the one at hand, or one that has not been."""
        least = max(self._records, default=0)
        near = (i for i in range(least, self.steps) if abs(self._levels[i] - sigma) <= _NEAR * max(sigma, _NEAR))
        return next(near, None)

    def _watch(self, latent: torch.Tensor) -> None:
        if self._evolution is None:
            return
        increment = None if self._before is None else latent.float() - self._before
        self._before = latent.detach().float().clone()
        self._evolution.end_step(increment, patch_of(self._model), None)
        self._evolution.begin_step()

    def _choose(self, index: int) -> int:
        runs = min((len(self._histories[key].recent) for key in self._last if key in self._histories), default=0)
        current = None if self._evolution is None else self._evolution.current
        counts = (self._spacing.consecutive_coarse, self._spacing.consecutive_skipped)
        multiple = self._policy.choose(StepView(index, self.steps, self._levels[index], *counts, runs, current))
        if multiple != SKIP and multiple not in self._config.multiples:
            raise ScheduleError(
                f"schedule[{index}]={multiple}: it must be one of multiples={self._config.multiples}, or {SKIP} to "
                "skip the step."
            )
        return 1 if multiple == SKIP and not runs else multiple

    # -- a model call of it ---------------------------------------------------------------------------------------

    def diffusion_model(self, executor: Any, *positional: Any, **named: Any) -> Any:
        """Around one call of the diffusion model; guidance makes two in a step, or one of twice the batch.

        Arguments and result are those of the model's forward. A call outside of a step runs plain.
        """
        step = self._now
        if step is None:
            return executor(*positional, **named)
        call = DiffusionCall.read(executor, positional, named)
        if call is None:
            self._note(step, "a latent of several tensors runs plain")
            step.ran.append(Ran.FULL)
            return executor(*positional, **named)
        parts = []
        for uuid in call.uuids:
            # one may come several times in a step, as windows of it or for guidance of its own kind
            key = (uuid, sum(one[0] == uuid for one in step.keys), call.latent.shape[1:], *call.switches)
            step.keys.append(key)
            parts.append(self._histories.setdefault(key, PredictionHistory()))
        models = self._models(call, step)
        history = joined(parts, models)
        if history is not None and step.multiple != 1:
            if step.multiple == SKIP or not self._path.calls_model:
                if history.recent:
                    return self._skipped(call, step, history)
                self._note(step, "a conditioning without a prediction to go on from ran full")
            else:
                obstacle = self._not_coarse(call, step, history)
                if not obstacle:
                    return self._coarse(call, step, history, parts, models)
                self._note(step, obstacle)
        return self._full(call, step, parts)

    def _not_coarse(self, call: DiffusionCall, step: _Step, history: PredictionHistory) -> str:
        last = history.recent[-1][1] if history.recent else None
        obstacle = call.obstacle(call.latent.shape[1] if last is None else last.shape[1])
        # a schedule given by hand may do without the anchor where the path can
        needs = self._path.needs_anchor or (self._path.prefers_anchor and self._config.schedule is None)
        return obstacle or ("no full step to start from" if needs and not history.anchors else "")

    def _full(self, call: DiffusionCall, step: _Step, parts: Sequence[PredictionHistory]) -> Any:
        output = call.run()
        step.ran.append(Ran.FULL)
        self._add(call, step, 1, 1)
        is_last = step.index is not None and step.index + 1 >= self.steps
        if isinstance(output, torch.Tensor) and step.index is not None and not is_last and self._remembers:
            latent = call.latent[:, : output.shape[1]]
            add_full(parts, step.sigma, canonical(latent), canonical(output.detach()), _UNREACHED)
        return output

    @property
    def _remembers(self) -> bool:
        return self._config.approximates and not self._obstacle

    def _skipped(self, call: DiffusionCall, step: _Step, history: PredictionHistory) -> torch.Tensor:
        step.ran.append(Ran.SKIPPED if step.multiple == SKIP else Ran.CACHED)
        step.record.executed = "cached"
        self._add(call, step, step.multiple, 0)
        linear = step.multiple == SKIP or self._config.coarse != "reuse"
        return restored(history.forecast(step.sigma, linear), call.latent)

    def _coarse(
        self,
        call: DiffusionCall,
        step: _Step,
        history: PredictionHistory,
        parts: Sequence[PredictionHistory],
        models: Models,
    ) -> torch.Tensor:
        multiple = step.multiple
        had = sum(multiple in anchor.residuals for anchor in history.anchors)
        latent = canonical(call.latent).float()
        prediction = self._path.predict(history, latent, step.sigma, multiple, call.geometry(), models)
        probes = sum(multiple in anchor.residuals for anchor in history.anchors) - had
        keep_residuals(history, parts)
        add_run(parts, step.sigma, prediction)
        step.ran.append(Ran.COARSE)
        self._add(call, step, multiple, 1 + probes)
        return restored(prediction, call.latent)

    def _models(self, call: DiffusionCall, step: _Step) -> Models:
        def low(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
            rope = None if self._native else centred(call.options.get("rope_options"), multiple)
            return call.run_low(latent, float(level) / step.sigma, rope)

        return Models(low, _no_tokens)

    def _add(self, call: DiffusionCall, step: _Step, multiple: int, runs: int) -> None:
        """Takes a call into the step's record."""
        if patch_of(self._model) is None or call.latent.ndim not in (4, 5):
            step.record.flops, step.record.full_flops = step.record.flops + runs, step.record.full_flops + 1
            return
        geometry, samples = call.geometry(), call.latent.shape[0]
        tokens = geometry.tokens(multiple) if multiple != SKIP else 0
        step.record.tokens = tokens if runs else 0
        step.record.flops += runs * self._cost.flops(tokens, call.text_tokens, samples)
        step.record.full_flops += self._cost.flops(geometry.tokens(1), call.text_tokens, samples)

    @staticmethod
    def _note(step: _Step, note: str) -> None:
        step.record.note = step.record.note or note

    def report(self, complete: bool) -> Report:
        """Of the steps so far, by index."""
        self._clock()
        return Report([self._records[index] for index in sorted(self._records)], self._config.to_dict(), complete)


def _no_tokens(latent: torch.Tensor, level: Scalar, multiple: int) -> torch.Tensor:
    raise ConfigError("coarse paths with projections of their own do not run in ComfyUI; use 'delta' or 'band-split'.")


# joined histories reach the model through the call at hand
_UNREACHED = Models(_no_tokens, _no_tokens)


def path_of(config: DDiTConfig) -> CoarsePath:
    """The coarse path of settings without an adapter."""
    name = default_path(False) if config.coarse == "auto" else config.coarse
    return make_path(name, PathOptions(config.residual, config.high_band))


def place(
    config: DDiTConfig, policy: Policy, sampler: SamplerFacts, levels: Sequence[float], most: float
) -> list[float]:
    """The noise levels that a run shall have.

    Args:
        config: Settings.
        policy: Whose ``place`` is asked, if it has one.
        sampler: Of the run.
        levels: That ComfyUI computed.
        most: The model's highest.

    Raises:
        ConfigError: they are to be moved, and this run's cannot be.
    """
    ask = getattr(policy, "place", None)
    placed = list(levels) if ask is None else [float(level) for level in ask(levels)]
    if placed == list(levels):
        return placed
    if not sampler.is_euler:
        what = f"sampler {sampler.name}"
    elif levels[0] < 0.999 * most:
        what = f"a run from noise level {levels[0]:.3f}"
    elif abs(levels[-1] - placed[-1]) > _NEAR:  # the sampler behind it would miss the noise that was to be left
        what = f"a run down to noise level {levels[-1]:.3f}"
    else:
        return placed
    raise ConfigError(
        f"the schedule has noise levels of its own, which {what} cannot follow: use sampler euler for a whole run, "
        "with denoise 1, sigmas that are not split and no leftover noise, or a schedule fitted with --reference plain."
    )


def policy_of(config: DDiTConfig) -> Policy:
    """The policy of settings, with the spacing that their coarse path asks for."""
    limit = config.max_consecutive_coarse
    return make_policy(config, path_of(config).max_consecutive if limit == "auto" else limit)


def _together(ran: Sequence[Ran]) -> Ran:
    """What a step's prediction comes from, where its calls came from several: the least that can be said of it."""
    kinds = set(ran)
    if len(kinds) == 1:
        return next(iter(kinds))
    return Ran.COARSE if kinds else Ran.FULL
