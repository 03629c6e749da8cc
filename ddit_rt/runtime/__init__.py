"""How a step executes: instance patches, CUDA graphs, the decision's way to the host, TeaCache, ranks."""

from .decision import HostResults, PendingEvolution
from .graphs import CaptureBackend, Captured, CudaGraphs, GraphRunner, make_runner
from .model_state import wrapped_forward
from .parallel import agreed, sequence_ranks, undividable
from .patching import MethodPatch, installed
from .teacache import THRESHOLDS, CacheState, TeaCache, Trunk, polynomial, relative_change
from .timing import stopwatch

__all__ = [
    "THRESHOLDS",
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
    "polynomial",
    "relative_change",
    "sequence_ranks",
    "stopwatch",
    "undividable",
    "wrapped_forward",
]
