"""A tiny pipeline per family and kind, for the conformity kit. One file per family, each with its SPECIMENS."""

from __future__ import annotations

import importlib
import pkgutil

from ddit_rt.families.testing import Specimen

SPECIMENS: dict[str, Specimen] = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(__path__)
    for specimen in importlib.import_module(f".{module.name}", __name__).SPECIMENS
}
