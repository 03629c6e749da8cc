"""How a step executes: instance patches, CUDA graphs, attention back-ends, model state, TeaCache, ranks."""

from .attention import Attention, AttentionSwitch, attention_by_name, capability_of, choose_attention
from .cuda_graphs import CudaGraphs, make_runner
from .graphs import CaptureBackend, Captured, GraphRunner
from .model_state import adapter_state, interventions, wrapped_forward
from .parallel import (
    agree_on_multiple,
    cannot_divide,
    divided,
    is_parallel,
    of_first_rank,
    own_part,
    sequence_ranks,
    uneven_parts,
)
from .patching import MethodPatch, installed
from .recording import CaptureRefused, Recording
from .substitution import substituted
from .teacache import CacheState, TeaCache, TeaCacheDefaults, Trunk, polynomial, relative_change

__all__ = [
    "Attention",
    "AttentionSwitch",
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
    "adapter_state",
    "agree_on_multiple",
    "attention_by_name",
    "cannot_divide",
    "capability_of",
    "choose_attention",
    "divided",
    "installed",
    "interventions",
    "is_parallel",
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
