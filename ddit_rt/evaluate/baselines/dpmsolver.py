"""DPM-Solver++ 2M (arXiv 2211.01095): second order from the last two evaluations."""

from __future__ import annotations

from diffusers import DPMSolverMultistepScheduler

from ...trajectories import BELOW_ONE, Solver
from .solver import OtherSolver


class DPMSolver(OtherSolver):
    """Of the data prediction, without noise."""

    name, kind = "dpmsolver++", "DPM-Solver++ 2M"
    solver = Solver(
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), limit=BELOW_ONE
    )
