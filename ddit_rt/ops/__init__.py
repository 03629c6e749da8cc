"""The operations DDiT adds to a transformer, with one validated signature over Triton kernels and plain PyTorch."""

from .adapter import AdapterFeatures, adapter_features, adapter_velocity
from .arguments import OpArgumentError
from .operations import (
    KERNEL_DTYPES,
    BackendError,
    BandMemory,
    BandRest,
    backend_of,
    band_rest,
    evolve_and_select,
    latent_evolution,
    patch_deembed,
    patch_embed,
    select_multiple,
)

__all__ = [
    "KERNEL_DTYPES",
    "AdapterFeatures",
    "BackendError",
    "BandMemory",
    "BandRest",
    "OpArgumentError",
    "adapter_features",
    "adapter_velocity",
    "backend_of",
    "band_rest",
    "evolve_and_select",
    "latent_evolution",
    "patch_deembed",
    "patch_embed",
    "select_multiple",
]
