"""Heun's method: second order, with two model evaluations a step."""

from __future__ import annotations

from diffusers import FlowMatchHeunDiscreteScheduler

from ...trajectories import Solver
from .solver import OtherSolver


class Heun(OtherSolver):
    """Half as many steps for the same evaluations; the last step takes one."""

    name, kind = "heun", "Heun"
    solver = Solver(FlowMatchHeunDiscreteScheduler, order=2)
