"""What an evaluation compares with: a file per baseline.

To add one, write its file with a class of :class:`Baseline`, :class:`StepCache`, :class:`OtherSolver` or
:class:`Library` and name it in :data:`BASELINES`.
"""

from .base import Baseline, Listing, StepCache, fixed
from .dbcache import runs_twice
from .other_library import Cached, Library
from .registry import BASELINES, find_cache, find_library, find_solver
from .solver import OtherSolver
from .teacache import TeaCache

__all__ = [
    "BASELINES",
    "Baseline",
    "Cached",
    "Library",
    "Listing",
    "OtherSolver",
    "StepCache",
    "TeaCache",
    "find_cache",
    "find_library",
    "find_solver",
    "fixed",
    "runs_twice",
]
