"""What coarse means: geometry of the token grid, the band-split algebra, and the paths that predict on fewer tokens."""

from .adapter import PatchEmbedding
from .coarse import Anchor, CoarsePath, Models, Trajectory, make_path
from .geometry import Geometry, coarse_centres, crop_to_latent, pad_to_grid, patchify, unpatchify

__all__ = [
    "Anchor",
    "CoarsePath",
    "Geometry",
    "Models",
    "PatchEmbedding",
    "Trajectory",
    "coarse_centres",
    "crop_to_latent",
    "make_path",
    "pad_to_grid",
    "patchify",
    "unpatchify",
]
