from typing import Any

import numpy as np
import torch

from .._names import InterpolationMode
from .._names import named as __getattr__
from . import functional

__all__ = ["InterpolationMode", "ToTensor", "__getattr__", "functional"]


class ToTensor:
    """A picture as (C, H, W) float32 in [0, 1]."""

    def __call__(self, picture: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
