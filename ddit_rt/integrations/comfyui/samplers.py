"""What is known of ComfyUI's samplers, and how a gap of skipped steps is closed in front of Euler's.

A sampler asks for the clean latent at a noise level and moves its latent by a rule of its own, out of reach. Euler's
rule is z + (z - x)/σ·(σ' - σ), so whatever latent :class:`ddit_rt.schedule.FlowSolver` wants to reach, there is one x
that makes it go there: forecast, corrector and moved noise levels work as in diffusers. Rules that keep a history of x
would mix that x into later steps; in front of those, skipped steps follow the line through the last two predictions,
and nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ...schedule import FlowSolver, Ran, latent_of

_NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")


@dataclass(frozen=True)
class SamplerFacts:
    """Of a sampler.

    Attributes:
        name: As ComfyUI lists it.
        is_euler: Its steps are Euler's, and nothing else happens in them.
        adds_noise: Between steps, so that no earlier one foretells the next.
    """

    name: str
    is_euler: bool
    adds_noise: bool

    @classmethod
    def of(cls, sampler: Any) -> SamplerFacts:
        """Of a ``SAMPLER`` of ComfyUI; one of an unknown kind is taken for one with rules of its own."""
        function = getattr(sampler, "sampler_function", None)
        name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
        churn = bool((getattr(sampler, "extra_options", None) or {}).get("s_churn"))
        return cls(name, name == "euler" and not churn, churn or any(word in name for word in _NOISY))


class EulerSteps:
    """The flow's solver in front of ComfyUI's Euler sampler.

    Args:
        levels: Noise levels of the steps and the one after them.
        toward: See :class:`FlowSolver`.
    """

    def __init__(self, levels: Sequence[float], toward: float) -> None:
        self._levels = levels
        self._solver = FlowSolver(FlowMatchEulerDiscreteScheduler(), levels, toward)

    @property
    def missed(self) -> torch.Tensor | None:
        return self._solver.missed

    def clean(self, index: int, ran: Ran, source: Hashable, latent: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The clean latent to hand to the sampler, so that its step leads where the solver wants to be.

        Args:
            index: Of the step.
            ran, source: As :meth:`FlowSolver.step` takes them.
            latent: Before the step, float32.
            clean: What the model, or a forecast, says; with guidance applied.

        Returns:
            ``clean`` itself where the step is the sampler's own.
        """
        sigma, h = self._levels[index], self._levels[index + 1] - self._levels[index]
        velocity = (latent - clean) / sigma
        made: list[tuple[torch.Tensor, torch.Tensor]] = []

        def step(given: torch.Tensor) -> tuple[tuple[torch.Tensor], torch.Tensor]:
            increment = h * velocity
            made.append((given, given + increment))
            return (made[0][1],), increment

        result, _ = self._solver.step(index, ran, source, velocity, latent, step)
        reached = latent_of(result)
        from_, own = made[0]
        if h == 0 or (from_ is latent and reached is own):
            return clean
        return latent - sigma / h * (reached - latent)
