"""Euler's method on noise levels spaced anew."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler

from ...trajectories import Solver
from .solver import DENSER, OtherSolver


class Euler(OtherSolver):
    """As FLUX's plain pipeline has it: spaced as it is, it is that pipeline at fewer steps."""

    name, kind = "euler", "Euler"
    solver = Solver(FlowMatchEulerDiscreteScheduler)
    spacings = (DENSER,)
