from ..._names import InterpolationMode
from ..._names import named as __getattr__

__all__ = ["InterpolationMode", "__getattr__"]
