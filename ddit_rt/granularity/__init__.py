"""What coarse means: geometry of the token grid, the band-split algebra, coarse paths, adapters."""

from . import bands
from .adapter import (
    Adapter,
    AdapterSpec,
    LoraSet,
    MergedSet,
    check_fit,
    fingerprint,
    is_fused,
    load_adapter,
    push_to_hub,
    save_adapter,
)
from .bands import Scalar
from .geometry import Geometry, coarse_centres, crop_to_latent, pad_to_grid, patchify, unpatchify
from .paths import AdapterPath, Anchor, CoarsePath, Models, PredictionHistory, line, make_path
from .projections import PatchEmbedding, PatchProjections
from .swap import swapped

__all__ = [
    "Adapter",
    "AdapterPath",
    "AdapterSpec",
    "Anchor",
    "CoarsePath",
    "Geometry",
    "LoraSet",
    "MergedSet",
    "Models",
    "PatchEmbedding",
    "PatchProjections",
    "PredictionHistory",
    "Scalar",
    "bands",
    "check_fit",
    "coarse_centres",
    "crop_to_latent",
    "fingerprint",
    "is_fused",
    "line",
    "load_adapter",
    "make_path",
    "pad_to_grid",
    "patchify",
    "push_to_hub",
    "save_adapter",
    "swapped",
    "unpatchify",
]
