"""The conformity kit: whether a family does all that the package promises, on a tiny pipeline of it.

A family of your own is checked in your own tests, with a :class:`Specimen` that says how its pipeline is made and
called::

    @pytest.mark.parametrize("name", CHECKS)
    def test_conformity(name):
        run_check(MINE, name)
"""

from . import coarse, exact, running, weights  # noqa: F401 (they register their checks)
from .checks import CHECKS, Check, NotRun, Outcome, run_check
from .coarse import counted_flops
from .specimen import MakeCall, Specimen, randomise, run

__all__ = [
    "CHECKS",
    "Check",
    "MakeCall",
    "NotRun",
    "Outcome",
    "Specimen",
    "counted_flops",
    "randomise",
    "run",
    "run_check",
]
