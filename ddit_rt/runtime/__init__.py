"""How a step executes: instance patches, CUDA graphs, model state, TeaCache, ranks."""

from .cuda_graphs import CudaGraphs, make_runner
from .graphs import CaptureBackend, Captured, GraphRunner
from .model_state import wrapped_forward
from .parallel import agree_on_multiple, cannot_divide, divided, of_first_rank, own_part, sequence_ranks, uneven_parts
from .patching import MethodPatch, installed
from .recording import CaptureRefused, Recording
from .substitution import substituted
from .teacache import CacheState, TeaCache, TeaCacheDefaults, Trunk, polynomial, relative_change

__all__ = [
    "CacheState",
    "CaptureBackend",
    "CaptureRefused",
    "Captured",
    "CudaGraphs",
    "GraphRunner",
    "MethodPatch",
    "Recording",
    "TeaCache",
    "TeaCacheDefaults",
    "Trunk",
    "agree_on_multiple",
    "cannot_divide",
    "divided",
    "installed",
    "make_runner",
    "of_first_rank",
    "own_part",
    "polynomial",
    "relative_change",
    "sequence_ranks",
    "substituted",
    "uneven_parts",
    "wrapped_forward",
]
