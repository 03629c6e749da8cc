"""How a step executes: instance patches, CUDA graphs, model state, TeaCache, ranks."""

from .graphs import CaptureBackend, Captured, CudaGraphs, GraphRunner, make_runner
from .model_state import wrapped_forward
from .parallel import agreed, sequence_ranks, undividable
from .patching import MethodPatch, installed
from .teacache import CacheState, TeaCache, TeaCacheDefaults, Trunk, polynomial, relative_change
from .timing import stopwatch

__all__ = [
    "CacheState",
    "CaptureBackend",
    "Captured",
    "CudaGraphs",
    "GraphRunner",
    "MethodPatch",
    "TeaCache",
    "TeaCacheDefaults",
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
