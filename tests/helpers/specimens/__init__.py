"""A tiny pipeline per family and kind, for the conformity kit. One file per family, each with its SPECIMENS."""

from __future__ import annotations

import importlib
import pkgutil

from ddit_rt.families.testing import Specimen


def _specimens() -> dict[str, Specimen]:
    """Those whose pipelines the installed diffusers has."""
    found: dict[str, Specimen] = {}
    for module in pkgutil.iter_modules(__path__):
        try:
            specimens = importlib.import_module(f".{module.name}", __name__).SPECIMENS
        except ImportError as error:
            if (error.name or "").split(".")[0] != "diffusers":
                raise
            continue
        found |= {specimen.name: specimen for specimen in specimens}
    return found


SPECIMENS = _specimens()
