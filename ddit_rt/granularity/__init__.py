"""What coarse means: geometry of the token grid, the band-split algebra, coarse paths, adapters."""

from . import bands
from .adapter import (
    Adapter,
    AdapterSpec,
    LoraSet,
    MergedSet,
    ModelFacts,
    check_fit,
    fingerprint,
    is_fused,
    load_adapter,
    push_to_hub,
    save_adapter,
)
from .bands import Scalar, crop_to_latent, pad_to_grid
from .ends import BandEnds, FusedEnds, NotFusedError, OwnEnds, PatchEnds, PlainEnds, check_fused
from .geometry import Geometry, coarse_centres, patchify, unpatchify
from .paths import (
    AdapterPath,
    Anchor,
    CoarsePath,
    Models,
    PathOptions,
    PredictionHistory,
    RunBands,
    default_path,
    line,
    make_path,
    path_names,
    register_path,
)
from .process import VariancePreserving
from .projections import PatchEmbedding, PatchProjections
from .swap import swapped

__all__ = [
    "Adapter",
    "AdapterPath",
    "AdapterSpec",
    "Anchor",
    "BandEnds",
    "CoarsePath",
    "FusedEnds",
    "Geometry",
    "LoraSet",
    "MergedSet",
    "ModelFacts",
    "Models",
    "NotFusedError",
    "OwnEnds",
    "PatchEmbedding",
    "PatchEnds",
    "PatchProjections",
    "PathOptions",
    "PlainEnds",
    "PredictionHistory",
    "RunBands",
    "Scalar",
    "VariancePreserving",
    "bands",
    "check_fit",
    "check_fused",
    "coarse_centres",
    "crop_to_latent",
    "default_path",
    "fingerprint",
    "is_fused",
    "line",
    "load_adapter",
    "make_path",
    "pad_to_grid",
    "patchify",
    "path_names",
    "push_to_hub",
    "register_path",
    "save_adapter",
    "swapped",
    "unpatchify",
]
