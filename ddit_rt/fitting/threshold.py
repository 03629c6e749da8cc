"""Finds the τ that gives a wanted speed-up on a model: what ``ddit-rt calibrate`` runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import DDiTConfig
from ..errors import ConfigError, OutOfReachError
from ..schedule import Report, check_speedup, choices_along, make_policy
from ..trajectories import Outcome, Prompt, call_with, generate, limited_psnr, name_of

_NEAR = 0.98  # of the wanted speed-up is near enough
_ALL = 1e6  # a τ that everything lies below


@dataclass
class Trial:
    """What one τ gave over all prompts: FLOP speed-up (mean), PSNR in dB to the plain output (mean)."""

    threshold: float
    speedup: float
    psnr: float


@dataclass
class Calibration:
    """The outcome of a search.

    Attributes:
        threshold: τ whose speed-up is nearest to the wanted one.
        speedup, psnr: What it gave.
        trials: Every τ tried, in order.
    """

    threshold: float
    speedup: float
    psnr: float
    trials: list[Trial] = field(default_factory=list)


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    speedup: float,
    settings: Mapping[str, Any] | None = None,
    trials: int = 6,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    **call: Any,
) -> Calibration:
    """Searches τ by real runs: a first guess from the σ curves of full runs, then bisection in log τ.

    Args:
        pipe: A supported pipeline; left plain.
        prompts: Prompts to average over, as for :func:`ddit_rt.fit`.
        speedup: Wanted ratio of FLOP, > 1.
        settings: Other settings of :func:`ddit_rt.accelerate` (no threshold, no schedule).
        trials: Values of τ to run.
        seed: Of the first prompt's noise; the i-th prompt takes seed + i.
        progress: Called with a line of text before every run.
        **call: Arguments of the pipeline.

    Raises:
        OutOfReachError: the other settings do not let the policy be that fast, whatever τ.
        ConfigError: ``speedup`` <= 1, or no prompt.
    """
    check_speedup(speedup)
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    settings = dict(settings or {})

    def run(given: Mapping[str, Any], threshold: float, prompts: Sequence[Prompt] = prompts) -> list[Outcome]:
        outcomes = []
        for i, prompt in enumerate(prompts):
            progress(f"τ = {threshold:.2e}: {name_of(prompt, i)}")
            arguments = call_with(prompt, call)
            outcomes.append(generate(pipe, {**given, "threshold": threshold}, seed + i, **arguments))
        return outcomes

    # multiple 1 throughout and no step from a cache, so its pictures are the plain pipeline's, and it records the σ
    # curves of full runs
    base = run({name: value for name, value in settings.items() if name != "cache"}, 0.0)
    config = DDiTConfig.make(None, {k: v for k, v in settings.items() if k != "adapter"})
    limit = _report(base[0]).config["max_consecutive_coarse"]
    # with every size smooth enough, the spacing rules alone decide, and they know no prompt
    fastest = _report(run(settings, _ALL, prompts[:1])[0]).speedup_estimate
    if fastest < _NEAR * speedup:
        raise OutOfReachError(
            f"speedup={speedup:g} is out of reach: with initial_full_steps={config.initial_full_steps:g}, "
            f"max_consecutive_coarse={limit}, skip_below={config.skip_below:g} the policy "
            f"reaches {fastest:.2f} at this number of steps, whatever τ. Ask for less, change those settings, or let "
            "`ddit-rt fit` find a schedule."
        )
    low, high = _guess([_report(outcome) for outcome in base], config, limit, speedup)
    found: list[Trial] = []
    for _ in range(trials):
        threshold = math.sqrt(low * high)
        outcomes = run(settings, threshold)
        mean_speedup = sum(_report(o).speedup_estimate for o in outcomes) / len(outcomes)
        mean_psnr = sum(limited_psnr(o.frames, b.frames) for o, b in zip(outcomes, base)) / len(outcomes)
        found.append(Trial(threshold, mean_speedup, mean_psnr))
        if abs(mean_speedup / speedup - 1) < 1 - _NEAR:
            break
        slow = [trial.threshold for trial in found if trial.speedup < speedup]
        fast = [trial.threshold for trial in found if trial.speedup >= speedup]
        # an end of the guessed bracket that no run has confirmed moves outwards
        low = max(slow) if slow else min(fast) / 4
        high = min((t for t in fast if t > low), default=low * 4)
    best = min(found, key=lambda trial: abs(math.log(trial.speedup / speedup)))
    return Calibration(best.threshold, best.speedup, best.psnr, found)


def _report(outcome: Outcome) -> Report:
    assert outcome.report is not None
    return outcome.report


def _guess(reports: Sequence[Report], config: DDiTConfig, limit: int | None, speedup: float) -> tuple[float, float]:
    """A bracket around the τ at which the policy, on the σ of full runs, would coarsen enough steps."""
    values = sorted(
        sigma
        for report in reports
        for step in report.steps
        for k, sigma in step.patch_std.items()
        if k == max(step.patch_std) and sigma > 0
    )
    if not values:
        raise ConfigError("no σ was recorded: the run is too short for its order, or every latent is constant.")

    def share(threshold: float) -> float:
        """FLOP over full FLOP, a coarse step at multiple k counted as 1/k² of a full one, a skipped step as none."""
        cost = steps = 0.0
        for report in reports:
            policy = make_policy(config.replace(threshold=threshold), limit)
            multiples = choices_along(policy, [step.patch_std for step in report.steps], threshold)
            cost += sum(1 / multiple**2 for multiple in multiples if multiple)
            steps += len(multiples)
        return cost / steps

    low, high = values[0] / 2, values[-1] * 2
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if share(middle) > 1 / speedup else (low, middle)
    return low / 3, high * 3
