"""The part of ``comfy_api.latest`` and of ``comfy`` that a node file imports, so that it can be loaded without them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from comfyui_double import Points


class Socket:
    """An input or output: what it was declared with."""

    def __init__(self, id: str | None = None, **declared: Any) -> None:
        self.id, self.declared = id, declared


class Output:
    """``io.NodeOutput``."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class PreviewText:
    def __init__(self, value: str) -> None:
        self.value = value


def load_pack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A folder of nodes as ComfyUI would import it."""
    kinds = {
        name: SimpleNamespace(Input=Socket, Output=Socket) for name in ("Combo", "Float", "Latent", "Model", "String")
    }
    io = SimpleNamespace(
        ComfyNode=object, Schema=lambda **fields: SimpleNamespace(**fields), NodeOutput=Output, **kinds
    )
    latest, comfy, extension = (
        ModuleType("comfy_api.latest"),
        ModuleType("comfy"),
        ModuleType("comfy.patcher_extension"),
    )
    latest.__dict__.update(ComfyExtension=object, io=io, ui=SimpleNamespace(PreviewText=PreviewText))
    extension.__dict__.update(WrappersMP=Points)
    modules = [ModuleType("comfy_api"), latest, comfy, extension]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(
        "ddit_nodes", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ddit_nodes", pack)
    monkeypatch.delitem(sys.modules, "ddit_nodes.nodes", raising=False)
    spec.loader.exec_module(pack)
    return pack
