"""UniPC (arXiv 2302.04867): a predictor and a corrector of second order that share their evaluations."""

from __future__ import annotations

from ...trajectories import UNIPC
from .solver import OtherSolver


class UniPC(OtherSolver):
    """Wan's own solver, and the one that the converged picture is made with."""

    name, kind = "unipc", "UniPC"
    solver = UNIPC
