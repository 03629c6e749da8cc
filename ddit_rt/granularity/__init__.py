"""What coarse means: geometry of the token grid, the band-split algebra, and the paths that predict on fewer tokens."""

from .adapter import Adapter, AdapterSpec, Ends, PatchEmbedding, fingerprint
from .adapter_file import check_fit, load_adapter, push_to_hub, save_adapter
from .coarse import Anchor, CoarsePath, Models, Trajectory, line
from .geometry import Geometry, coarse_centres, crop_to_latent, pad_to_grid, patchify, unpatchify
from .learned import Learned
from .lora import LoraSet
from .merged import MergedSet
from .paths import make_path
from .swap import swapped

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Anchor",
    "CoarsePath",
    "Ends",
    "Geometry",
    "Learned",
    "LoraSet",
    "MergedSet",
    "Models",
    "PatchEmbedding",
    "Trajectory",
    "check_fit",
    "coarse_centres",
    "crop_to_latent",
    "fingerprint",
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
