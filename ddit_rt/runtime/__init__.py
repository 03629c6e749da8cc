"""How a chosen size executes: patches on instances, timing, and the way of the decision to the host."""

from .decision import PendingEvolution
from .patching import MethodPatch
from .teacache import CacheState, TeaCache, Trunk
from .timing import stopwatch

__all__ = ["CacheState", "MethodPatch", "PendingEvolution", "TeaCache", "Trunk", "stopwatch"]
