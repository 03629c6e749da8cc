from ..._names import named as __getattr__
from .. import InterpolationMode, ToTensor
from . import functional

__all__ = ["InterpolationMode", "ToTensor", "__getattr__", "functional"]
