"""How a chosen size executes: patches on instances, timing, and the way of the decision to the host."""

from .decision import HostResults, PendingEvolution
from .graphs import CaptureBackend, Captured, CudaGraphs, GraphRunner, make_runner
from .parallel import agreed, sequence_ranks, undividable
from .patching import MethodPatch, installed
from .teacache import CacheState, TeaCache, Trunk
from .timing import stopwatch
from .watch import wrapped_forward

__all__ = [
    "CacheState",
    "CaptureBackend",
    "Captured",
    "CudaGraphs",
    "GraphRunner",
    "HostResults",
    "MethodPatch",
    "PendingEvolution",
    "TeaCache",
    "Trunk",
    "agreed",
    "installed",
    "make_runner",
    "sequence_ranks",
    "stopwatch",
    "undividable",
    "wrapped_forward",
]
