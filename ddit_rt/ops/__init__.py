"""The operations DDiT adds to a transformer, with one validated signature over Triton kernels and plain PyTorch."""

from .arguments import OpArgumentError
from .operations import BackendError, evolve_and_select, latent_evolution, patch_deembed, patch_embed, select_multiple

__all__ = [
    "BackendError",
    "OpArgumentError",
    "evolve_and_select",
    "latent_evolution",
    "patch_deembed",
    "patch_embed",
    "select_multiple",
]
