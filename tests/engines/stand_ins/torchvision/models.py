from ._names import named as __getattr__

__all__ = ["__getattr__"]
