"""One file per transformer class. Adding a model is adding a file, and naming it in :data:`FAMILIES`."""

from __future__ import annotations

import importlib
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..errors import UnsupportedPipelineError
from .base import Family, ModelInputs, NotCoarseError, raw_sample
from .fresh import fresh_adapter
from .identity import fingerprint
from .joining import Expectation, Joiner, NotJoinedError, expected_second
from .packed import PackedFamily, PositionIdFamily
from .streams import TwoStreamFamily
from .weights import lora_scale, scaled_loras

_FILES = {
    "dit": ("DiT",),
    "flux": ("Flux",),
    "flux2": ("Flux2",),
    "flux_like": ("Chroma", "LongCatImage", "OvisImage"),
    "hunyuan_video15": ("HunyuanVideo15",),
    "krea2": ("Krea2",),
    "ltx2": ("LTX2",),
    "pixart": ("PixArt",),
    "qwen": ("QwenImage",),
    "sd3": ("SD3",),
    "wan": ("Wan",),
    "wan_animate": ("WanAnimate",),
    "wan_vace": ("WanVACE",),
    "z_image": ("ZImage",),
}
"""File -> its families, in the order in which they are asked."""


def _families_here() -> list[Family]:
    """Those whose classes the installed diffusers has."""
    found: list[Family] = []
    for file, names in _FILES.items():
        try:
            module = importlib.import_module(f".{file}", __name__)
        except ImportError as error:
            if (error.name or "").split(".")[0] != "diffusers":
                raise
            continue
        found += [getattr(module, name)() for name in names]
    return found


FAMILIES: list[Family] = _families_here()
"""All families that are known."""

__all__ = [
    "FAMILIES",
    "Expectation",
    "Family",
    "Joiner",
    "ModelInputs",
    "NotCoarseError",
    "NotJoinedError",
    "PackedFamily",
    "PositionIdFamily",
    "TwoStreamFamily",
    "denoisers",
    "expected_second",
    "family_of",
    "fingerprint",
    "fresh_adapter",
    "lora_scale",
    "raw_sample",
    "register_family",
    "scaled_loras",
    "supported_pipelines",
]


def register_family(family: Family) -> None:
    """Makes a family known that is defined elsewhere; it is asked before those that are known.

    Raises:
        ValueError: its name is taken.
    """
    if family.name in (known.name for known in FAMILIES):
        raise ValueError(f"there is a family {family.name!r} already.")
    FAMILIES.insert(0, family)


def family_of(pipe: Any) -> Family:
    """The family that runs a pipeline.

    Raises:
        UnsupportedPipelineError: no family knows the pipeline's class or its transformer; lists those that are known.
    """
    for family in FAMILIES:
        if family.knows(pipe):
            modules = denoisers(pipe, family)
            if not modules:
                raise UnsupportedPipelineError(
                    f"{type(pipe).__name__} has no {' or '.join(family.components)} loaded: nothing to accelerate."
                )
            for name, module in modules.items():
                if not isinstance(unwrap_module(module), family.transformer_class):
                    raise UnsupportedPipelineError(
                        f"{name} is a {type(module).__name__}; {type(pipe).__name__} is supported with "
                        f"{family.transformer_class.__name__}."
                    )
            family.check_pipeline(pipe)
            return family
    raise UnsupportedPipelineError(f"{type(pipe).__name__} is not supported. {supported_pipelines()}")


def supported_pipelines() -> str:
    """A sentence that lists the pipeline classes of all families, for messages."""
    names = ", ".join(
        name for family in FAMILIES for name in (*(cls.__name__ for cls in family.pipelines), *family.modular)
    )
    return f"Supported pipelines: {names}."


def denoisers(pipe: Any, family: Family) -> dict[str, nn.Module]:
    """Component name -> transformer, for the components that are loaded."""
    found = {name: getattr(pipe, name, None) for name in family.components}
    return {name: module for name, module in found.items() if module is not None}
